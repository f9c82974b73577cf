// Statistics of a masked contrastive loss and their gradient. See hpkernels/ops/contrastive for the maths.
//
//     l_ij = <x_i, x_j> / temperature        E_ij = [i != j] (P_ij or M_{i mod R, j}), or [i != j]
//     lse_i = log sum_j E_ij exp(l_ij)       pos_i = sum_j P_ij l_ij       ext_i = sum_j Q_ij l_ij
//     G_ij = grad_lse_i E_ij exp(l_ij - lse_i) + grad_pos_i P_ij + grad_ext_i Q_ij
//     grad_x_i = sum_j (G_ij + G_ji) x_j / temperature
//
// A call takes the anchors i = first .. first + count - 1 against all rows j: the masks P and Q, the statistics and the
// gradient have a row per anchor; x, the negatives and the tables that the gradient reads have all rows. Where all rows
// are anchors, the dense kernels and the gradient of the negatives use that l_ij = l_ji.
#pragma once

#include <cstdint>

#include "cpu/runtime/isa.h"

namespace hpk {

// Down to this temperature the constant 1/temperature serves as the shift of every exponential: l lies within it, and
// exp(-2/temperature) is still a normal fp32 number. Below, each row uses its own maximum.
constexpr double kFixedShiftTemperature = 0.025;

// Masks are bits (see pair_bits.h), rows of `words` words. positives_t, extra_t are the anchors' rows of the transposed
// masks (the same pointer for symmetric ones); extra, extra_t and negatives may be null. Diagonal bits are ignored.
struct ContrastiveMasks {
  const uint32_t *positives, *positives_t, *extra, *extra_t;
  const uint32_t* negatives;  // negative_rows rows, shared by the rows i with the same i mod negative_rows
  int64_t words, negative_rows;
};

template <class T>
struct ContrastiveArgs {
  const T* x;  // (streams, rows, depth), unit rows
  int64_t streams, rows, depth;
  int64_t first, count;  // the anchors
  ContrastiveMasks masks;
  double temperature;
  int threads;

  bool all_anchors() const { return count == rows; }
};

// E by groups instead of bits: E_ij = [query_i >= 0][key_j >= 0][query_i != key_j], a number of each row for either
// part. A row of -1 is no anchor, or in no denominator. The same pointer twice: one set of rows against itself.
struct ContrastiveGroups {
  const int32_t *query, *key;  // (rows) each
};

template <class T>
struct ContrastiveStats {
  T *lse, *pos, *ext;  // (streams, count) each
};

template <class T>
struct ContrastiveGrads {
  const T *lse, *grad_lse, *grad_pos, *grad_ext;  // (streams, rows) each
  T* grad_x;                                      // (streams, count, depth)
};

#define HPK_CONTRASTIVE(T)                                                                                 \
  void contrastive_sparse_stats(const ContrastiveArgs<T>& args, const ContrastiveStats<T>& out);           \
  void contrastive_sparse_grad(const ContrastiveArgs<T>& args, const ContrastiveGrads<T>& grads);          \
  void contrastive_dense_stats(const ContrastiveArgs<T>& args, bool all, const ContrastiveStats<T>& out);  \
  void contrastive_dense_grad(const ContrastiveArgs<T>& args, bool all, const ContrastiveGrads<T>& grads); \
  void contrastive_group_lse(const ContrastiveArgs<T>& args, const ContrastiveGroups& groups, T* lse);     \
  void contrastive_group_grad(const ContrastiveArgs<T>& args, const ContrastiveGroups& groups,             \
                              const ContrastiveGrads<T>& grads);

}  // namespace hpk

HPK_DECLARE(HPK_CONTRASTIVE(float) HPK_CONTRASTIVE(double))
