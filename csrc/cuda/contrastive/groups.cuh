// The denominator that groups describe: rows against columns, of another set or their own, whose groups differ. Masks
// are made from four bytes a row where a tile needs them; statistics are those of dense.cuh, gradients the
// panels of contrastive_lists_grad.cuh.
#pragma once

#include "cuda/contrastive/dense.cuh"
#include "cuda/contrastive/lists_grad.cuh"

namespace hpk::gpu {

// E_ij = [g_i >= 0][h_j >= 0][g_i != h_j] for the rows i and the columns j. All rows are anchors.
template <class T>
struct GroupPairs {
  const T* x;  // of the columns: (count, depth)
  int64_t count, anchors;
  const int *row_groups, *column_groups;

  static constexpr int64_t first_row = 0;
  __device__ ConsecutiveRows<T> columns(const T*, int64_t) const { return {x, count, 0}; }
  __device__ bool is_anchor(int64_t i) const { return i < anchors; }
};

__device__ inline bool groups_differ(int row_group, int column_group) {
  return row_group >= 0 && column_group >= 0 && row_group != column_group;
}

// The pairs of a thread's rows, of groups; see BitWords.
template <class T>
class GroupWords {
 public:
  using Masks = GroupPairs<T>;
  static constexpr bool kPositives = false;

  __device__ GroupWords(const Places&, const Masks& pairs, int64_t, int64_t) : pairs_(pairs) {}
  __device__ void load(const Places& at, int64_t first_column) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t j = first_column + at.lane % 4 * 2 + e / 2 * 8 + e % 2;
      groups_[e] = j < pairs_.count ? pairs_.column_groups[j] : -1;
    }
  }
  __device__ PairWords of_row(const Places&, int64_t i, int, int) const {
    const int group = i < pairs_.anchors ? pairs_.row_groups[i] : -1;
    uint32_t inside = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      inside |= static_cast<uint32_t>(groups_differ(group, groups_[e])) << (e / 2 * 8 + e % 2);
    return {inside, 0, 0};
  }

 private:
  const Masks& pairs_;
  int groups_[8];  // of the thread's columns
};

// The row tables of the anchors, which are the rows, the columns or both; null on the other side. lse in base 2. With
// a shift above 0 a factor is grad_lse exp2(shift - lse), so that one exponential serves both directions; else
// grad_lse.
struct GroupTables {
  const float *row_lse, *row_factor, *column_lse, *column_factor;
  float shift;

  // grad_lse_i p_ij + grad_lse_j p_ji for logit z of a pair in E.
  __device__ float weight(int64_t i, int64_t j, float z) const {
    const float of_row = row_factor ? row_factor[i] : 0.0f, of_column = column_factor ? column_factor[j] : 0.0f;
    if (shift > 0.0f) return (of_row + of_column) * exp2_fast(z - shift);
    float weight = 0.0f;  // the other side's exponential may be infinite
    if (row_factor) weight += of_row * exp2_fast(z - row_lse[i]);
    if (column_factor) weight += of_column * exp2_fast(z - column_lse[j]);
    return weight;
  }
};

// out_i = out_scale sum_j weight_ij column_j, or the sum over share y of the columns in partial (shares, rows, depth).
// Block (x, y, z): panel x of the rows, share y of the columns, piece z of the columns of x.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    contrastive_group_grad_kernel(ContrastiveRows<T> rows, GroupPairs<T> pairs, GroupTables tables,
                                  const float* out_scale, T* out, float* partial) {
  const int total = static_cast<int>(rows.rows), first = blockIdx.x * kPanel;
  const int tiles = (static_cast<int>(pairs.count) + kPanel - 1) / kPanel;
  const int share = (tiles + int(gridDim.y) - 1) / int(gridDim.y), begin = share * blockIdx.y * kPanel;
  const int left = static_cast<int>(pairs.count) - begin, size = left < share * kPanel ? left : share * kPanel;
  const SteppedRows<T> panel{rows.x, first, 1, total - first < kPanel ? total - first : kPanel};
  const SteppedRows<T> columns{pairs.x, begin, 1, size};
  auto& memory = *reinterpret_cast<PanelMemory<T>*>(dynamic_shared());
  PanelSums<T> sums(memory, rows.depth);
  const PanelPlaces at;
  const auto weight_of = [&](int i, int j, float z) {
    return groups_differ(pairs.row_groups[i], pairs.column_groups[j]) ? tables.weight(i, j, z) : 0.0f;
  };
  if (size > 0) add_tiles(sums, memory, rows, panel, columns, (size + kPanel - 1) / kPanel, at, weight_of);
  const float scale = *out_scale;
  sums.for_each_pair(at, [&](int row, int column, float low, float high) {
    if (row >= panel.count) return;
    const int64_t to = int64_t(first + row) * rows.depth + column;
    if (partial)
      store_two(partial + blockIdx.y * rows.rows * rows.depth + to, low * scale, high * scale);
    else
      store_two(out + to, low * scale, high * scale);
  });
}

}  // namespace hpk::gpu
