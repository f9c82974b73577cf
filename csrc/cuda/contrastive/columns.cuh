// The column side of the negatives: to dX_j come grad_lse_i p_ij x_i from all rows i whose negatives name column j.
//
// Neighbouring columns are named by different rows, so nothing is shared between them; but the rows i = t, t + R, ...
// name the same columns. A panel of 64 columns of row t of M, times these rows, leaves one sum for each (t, column).
// The sums lie behind one another in the order (column, t), and each column adds up its own: fixed order, no atomics.
// A window of columns at a time shares a workspace of fixed size.
#pragma once

#include "cuda/contrastive/lists_grad.cuh"

namespace hpk::gpu {

// turned (columns, words): bit (j, t) is bit (t, j) of the negatives; counts[j] its set bits, 0 where j is no anchor.
// A warp turns 32 columns.
static __global__ void __launch_bounds__(kTileThreads)
    contrastive_turn_negatives_kernel(ContrastiveMasks masks, int64_t columns, int64_t words, uint32_t* turned,
                                      int* counts) {
  const int lane = threadIdx.x % 32;
  const int64_t from_word = blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32, j = from_word * 32 + lane;
  if (from_word * 32 >= columns) return;
  int count = 0;
  for (int64_t word = 0; word < words; ++word) {
    const int64_t t = word * 32 + lane;
    const uint32_t bits = t < masks.period ? masks.negatives[t * masks.stride + from_word] : 0;
    uint32_t own = 0;
    for (int k = 0; k < 32; ++k) {
      const uint32_t column = __ballot_sync(0xffffffffu, bits >> k & 1);
      if (k == lane) own = column;
    }
    if (j < columns) turned[j * words + word] = own;
    count += __popc(own);
  }
  if (j < columns) counts[j] = masks.is_anchor(j) ? count : 0;
}

__device__ inline int ColumnSlots::slot(int64_t j, int64_t t) const {
  const uint32_t* row = turned + j * words;
  int rank = __popc(row[t / 32] & ((1u << (t % 32)) - 1u));
  for (int64_t word = 0; word < t / 32; ++word)
    rank += __popc(row[word]);
  return static_cast<int>(starts[j] - starts[window[0]]) + rank;
}

// Block (x, y, z): row x of the negatives, every gridDim.y-th tile of its columns, piece z of the columns of x.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    contrastive_column_side_kernel(ContrastiveRows<T> rows, ContrastiveMasks masks, ContrastiveTables tables,
                                   ColumnSlots slots, T* workspace) {
  const int first = slots.window[0], end = slots.window[1];
  if (!slots.fit() || first >= end) return;
  const int t = blockIdx.x;
  const PanelPlaces at;
  auto& memory = *reinterpret_cast<ListedPanelMemory<T>*>(dynamic_shared());
  PanelSums<T> sums(memory, rows.depth);
  const SteppedRows<T> named{rows.x, t, static_cast<int>(masks.period), static_cast<int>(rows.rows / masks.period)};
  const int tiles = (named.count + kPanel - 1) / kPanel;
  ListWalk<NegativesRow> walk(memory.list, NegativesRow{masks, t, first, end}, first / 32, (end + 31) / 32);
  const auto weight_of = [&](int i, int j, float z) { return pair_weight(masks, tables, Pairs::kNamed, i, j, z); };
  int turn = 0;
  while (const int panels = walk.next())
    for (int panel = 0; panel < panels; ++panel, ++turn) {
      if (turn % int(gridDim.y) != int(blockIdx.y)) continue;
      const ListedRows<T> columns{rows.x, memory.list.columns + panel * kPanel, walk.held() - panel * kPanel};
      __syncthreads();  // the slots of the last panel are read
      if (threadIdx.x < kPanel) memory.slots[threadIdx.x] = slots.slot(columns.at(threadIdx.x), t);
      sums.clear();
      add_tiles(sums, memory, rows, columns, named, tiles, at, weight_of);
      sums.for_each_pair(at, [&](int row, int column, float low, float high) {
        if (row < columns.count) store_two(workspace + memory.slots[row] * rows.depth + column, low, high);
      });
    }
}

// out_j = out_scale (partial_j + the sums of column j in order) for the window's columns, rows counted from the first
// anchor; without the sums where they do not fit.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    contrastive_column_sum_kernel(int64_t first_row, int64_t depth, ColumnSlots slots, const T* workspace,
                                  const float* partial, const float* out_scale, T* out) {
  const int64_t first = slots.window[0], end = slots.window[1];
  const bool fit = slots.fit();
  for (int64_t j = first + blockIdx.x; j < end; j += gridDim.x) {
    const T* from = workspace + (slots.starts[j] - slots.starts[first]) * depth;
    const int64_t count = fit ? slots.starts[j + 1] - slots.starts[j] : 0, to = (j - first_row) * depth;
    for (int64_t d = threadIdx.x * 2; d < depth; d += 2 * kTileThreads) {
      float2 sum{0.0f, 0.0f};
#pragma unroll 4
      for (int64_t s = 0; s < count; ++s) {
        const float2 two = load_two(from + s * depth + d);
        sum.x += two.x, sum.y += two.y;
      }
      const float2 before = load_two(partial + to + d);
      store_two(out + to + d, (before.x + sum.x) * *out_scale, (before.y + sum.y) * *out_scale);
    }
  }
}

}  // namespace hpk::gpu
