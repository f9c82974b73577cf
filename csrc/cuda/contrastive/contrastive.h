// Launches of the contrastive kernels.
#pragma once

#include "cuda/common/launches.h"

namespace hpk::gpu {

template <class T>
struct ConsecutiveRows;

// Bits of the anchors i = first_row + r, r < anchors, against all columns j; rows of `stride` words. Null: there is no
// such mask or, for a transpose (`_t`), it is symmetric. The negatives have `period` rows; row i uses row i mod period.
struct ContrastiveMasks {
  const uint32_t *positives, *positives_t, *extra, *extra_t, *negatives;
  int64_t stride, period, first_row, anchors;
  bool everything;  // the denominator is every j != i

  // The columns of a stream: its own rows.
  template <class T>
  __device__ ConsecutiveRows<T> columns(const T* x, int64_t rows) const;
  __device__ bool is_anchor(int64_t i) const { return i >= first_row && i < first_row + anchors; }
  // Row i of P and Q, of the nearest anchor where i is none.
  __device__ int64_t mask_row(int64_t i) const {
    return i < first_row ? 0 : i < first_row + anchors ? i - first_row : anchors - 1;
  }
  __device__ int64_t negatives_row(int64_t i) const {  // 32-bit: a 64-bit division is a hundred instructions
    return static_cast<uint32_t>(i) % static_cast<uint32_t>(period);
  }
};

struct ContrastiveTables {
  const float *lse, *grad_lse, *grad_pos, *grad_ext;  // (rows,); lse in base 2
};

// The pairs of a list, and which of their weights count.
enum class Pairs : int {
  kAll,         // dense: all of G_ij + G_ji
  kPositives,   // P and Q of both directions, and the exponentials of the positives outside of M
  kNegatives,   // the listed columns j of M_i: grad_lse_i p_ij
  kNamed,       // rows j whose M_j names i: grad_lse_j p_ji
  kNamedByBits  // the same, where M decides which they are
};

// Where the sums of a window lie: those of column j from starts[j] - starts[window[0]] on. Nothing is done if all sums
// (starts[columns] of them) are more than `capacity`.
struct ColumnSlots {
  const uint32_t* turned;
  int64_t words;
  const int64_t* starts;
  const int* window;  // first column, end
  int64_t columns, capacity;

  __device__ bool fit() const { return starts[columns] <= capacity; }
  __device__ int slot(int64_t j, int64_t t) const;
};

// turned (columns, words), counts (columns,) int32.
void contrastive_turn_negatives(const ContrastiveMasks& masks, int64_t columns, int64_t words, uintptr_t turned,
                                uintptr_t counts, uintptr_t stream);

template <class T>
struct ContrastiveLaunches {
  // x (streams, rows, depth); parts (4, shares, streams, anchors), see StatsParts.
  static void contrastive_stats(uintptr_t x, int64_t streams, int64_t rows, int64_t depth,
                                const ContrastiveMasks& masks, float scale, float first_shift, float over_temperature,
                                int shares, uintptr_t parts, uintptr_t stream);
  // x (rows, depth), tables (rows,), out (out_rows, out_width) for the rows from first_row on; see the kernel.
  static void contrastive_weights(uintptr_t x, int64_t rows, int64_t depth, const ContrastiveMasks& masks, float scale,
                                  float shift, const ContrastiveTables& tables, int64_t first_row, int64_t out_rows,
                                  int64_t out_width, uintptr_t out, uintptr_t stream);
  // The same for a family of lists: part `part` of `shares`.
  static void contrastive_listed_stats(uintptr_t x, int64_t streams, int64_t rows, int64_t depth,
                                       const ContrastiveMasks& masks, Pairs pairs, float scale, float first_shift,
                                       float over_temperature, int part, int shares, uintptr_t parts, uintptr_t stream);
  // x (rows, depth), tables (rows,); out (anchors, depth), or partial (anchors, depth) fp32; see PanelTarget.
  static void contrastive_listed_grad(uintptr_t x, int64_t rows, int64_t depth, const ContrastiveMasks& masks,
                                      Pairs pairs, float scale, const ContrastiveTables& tables, uintptr_t out,
                                      uintptr_t partial, bool add, uintptr_t out_scale, uintptr_t slots, int64_t above,
                                      uintptr_t stream);
  static void contrastive_column_side(uintptr_t x, int64_t rows, int64_t depth, const ContrastiveMasks& masks,
                                      float scale, const ContrastiveTables& tables, const ColumnSlots& slots,
                                      int shares, uintptr_t workspace, uintptr_t stream);
  static void contrastive_column_sum(uintptr_t workspace, int64_t first_row, int64_t depth, const ColumnSlots& slots,
                                     int blocks, uintptr_t partial, uintptr_t out_scale, uintptr_t out,
                                     uintptr_t stream);
};

}  // namespace hpk::gpu
