// Row reductions of s_ij: the maximum, the best key, the k best keys, or the ordered keys themselves.
//
// A block owns 128 rows and walks the tiles of its share of the keys; shares are merged by the caller.
#pragma once

#include <cmath>

#include "cuda/common/tile.cuh"
#include "shared/ordered_key.h"

namespace hpk::gpu {

constexpr int kRowStages = 3;
constexpr int kListStages = 2;  // leaves room for the sorting of lists within the 99 KB of sm_86 and sm_89

template <class T>
struct RowSearch {
  const T *queries, *keys;  // (rows, depth), (columns, depth)
  int64_t rows, columns, depth;
  bool exclude_self;
  // Both or none: groups ascending; row i of `queries` is row row_ids[i] of the caller, key j is key_ids[j].
  // Within a group the ids ascend.
  const int64_t *row_groups, *key_groups, *row_ids, *key_ids;
};

struct TileRange {
  int64_t first, count;
};

// The first of `count` ascending groups that is not below (or, with `above`, is above) `group`.
__device__ inline int64_t group_bound(const int64_t* groups, int64_t count, int64_t group, bool above) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (groups[middle] < group || (above && groups[middle] == group))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The tiles of keys that rows [first_row, first_row + 128) may choose from, cut to share blockIdx.y of gridDim.y.
template <class T>
__device__ inline TileRange share_of_tiles(const RowSearch<T>& job, int64_t first_row) {
  int64_t begin = 0, end = job.columns;
  if (job.row_groups) {
    const int64_t last_row = first_row + kTile < job.rows ? first_row + kTile - 1 : job.rows - 1;
    begin = group_bound(job.key_groups, job.columns, job.row_groups[first_row], false);
    end = group_bound(job.key_groups, job.columns, job.row_groups[last_row], true);
  }
  const int64_t first_tile = begin / kTile;
  const int64_t tiles = end > begin ? (end + kTile - 1) / kTile - first_tile : 0;
  const int64_t share = (tiles + gridDim.y - 1) / gridDim.y;
  const int64_t first = share * blockIdx.y < tiles ? share * blockIdx.y : tiles;
  return {first_tile + first, tiles - first < share ? tiles - first : share};
}

// Which pairs may be chosen. Indices are those of the caller.
template <class T>
struct Choice {
  const RowSearch<T>& job;

  __device__ int64_t row_id(int64_t i) const { return job.row_ids ? job.row_ids[i < job.rows ? i : job.rows - 1] : i; }
  __device__ int64_t key_id(int64_t j) const {
    return job.key_ids ? job.key_ids[j < job.columns ? j : job.columns - 1] : j;
  }
  __device__ bool allowed(int64_t i, int64_t j) const {
    if (i >= job.rows || j >= job.columns) return false;
    if (job.row_groups && job.row_groups[i] != job.key_groups[j]) return false;
    return !job.exclude_self || row_id(i) != key_id(j);
  }
};

// The larger, NaN if either is.
__device__ inline float larger(float best, float s) { return s > best || s != s ? s : best; }

// out[blockIdx.y][i] = max of s_ij over the share; NaN if any product is.
template <class T>
__global__ void __launch_bounds__(kTileThreads) max_similarity_kernel(RowSearch<T> job, float* out) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const TileRange range = share_of_tiles(job, first_row);
  const Places at;
  TileStream<T, kRowStages> products({job.queries, job.rows, first_row}, {job.keys, job.columns, 0}, range.first,
                                     range.count, job.depth, dynamic_shared());
  float best[4][2];
#pragma unroll
  for (int m = 0; m < 4; ++m)
    best[m][0] = best[m][1] = -INFINITY;
  for (int64_t tile = 0; tile < range.count; ++tile) {
    Accumulators acc;
    products.next(acc, at);  // columns past the end repeat the last key: no new maximum
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          best[m][e / 2] = larger(best[m][e / 2], acc[m][n][e]);
  }
  __syncthreads();  // the buffers of the products become those of the warps' maxima
  auto of_warp = reinterpret_cast<float (*)[kTile]>(dynamic_shared());
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int mask = 1; mask <= 2; mask *= 2)
        best[m][h] = larger(best[m][h], __shfl_xor_sync(0xffffffffu, best[m][h], mask));
      if (at.lane % 4 == 0) of_warp[at.warp_column][at.row(m, h)] = best[m][h];
    }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= kTile || first_row + row >= job.rows) return;
  float value = of_warp[0][row];
  for (int warp = 1; warp < 4; ++warp)
    value = larger(value, of_warp[warp][row]);
  out[blockIdx.y * job.rows + first_row + row] = value;
}

// out[i][blockIdx.y] = the ordered key of the best of the share, kEmptyKey without one.
template <class T>
__global__ void __launch_bounds__(kTileThreads) best_key_kernel(RowSearch<T> job, int64_t* out) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const TileRange range = share_of_tiles(job, first_row);
  const Places at;
  const Choice<T> choice{job};
  TileStream<T, kRowStages> products({job.queries, job.rows, first_row}, {job.keys, job.columns, 0}, range.first,
                                     range.count, job.depth, dynamic_shared());
  float best[4][2];
  int64_t where[4][2];
#pragma unroll
  for (int m = 0; m < 4; ++m)
    best[m][0] = best[m][1] = -INFINITY, where[m][0] = where[m][1] = -1;
  for (int64_t tile = range.first; tile < range.first + range.count; ++tile) {
    Accumulators acc;
    products.next(acc, at);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int b = 0; b < 2; ++b) {  // ascending columns: an equal value later is not better
        const int64_t j = tile * kTile + at.column(n, b);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float s = acc[m][n][2 * h + b];
            if (s > best[m][h] && choice.allowed(first_row + at.row(m, h), j)) best[m][h] = s, where[m][h] = j;
          }
      }
  }
  __syncthreads();
  auto of_warp = reinterpret_cast<int64_t (*)[kTile]>(dynamic_shared());
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t key = where[m][h] < 0 ? kEmptyKey : ordered_key(best[m][h], choice.key_id(where[m][h]));
      for (int mask = 1; mask <= 2; mask *= 2) {
        const int64_t other = __shfl_xor_sync(0xffffffffu, key, mask);
        key = other > key ? other : key;
      }
      if (at.lane % 4 == 0) of_warp[at.warp_column][at.row(m, h)] = key;
    }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= kTile || first_row + row >= job.rows) return;
  int64_t key = of_warp[0][row];
  for (int warp = 1; warp < 4; ++warp)
    key = of_warp[warp][row] > key ? of_warp[warp][row] : key;
  out[(first_row + row) * gridDim.y + blockIdx.y] = key;
}

// Sorts sorted[0, size) by a warp, larger keys first; size is a power of two.
__device__ inline void sort_descending(int64_t* sorted, int size, int lane) {
  for (int run = 2; run <= size; run *= 2)
    for (int gap = run / 2; gap; gap /= 2) {
      __syncwarp();
      for (int pair = lane; pair < size / 2; pair += 32) {
        const int low = pair / gap * 2 * gap + pair % gap, high = low + gap;
        const int64_t x = sorted[low], y = sorted[high];
        const bool descending = (low & run) == 0;
        if (descending ? x < y : y < x) sorted[low] = y, sorted[high] = x;
      }
    }
  __syncwarp();
}

HPK_HOST_DEVICE constexpr int64_t topk_shared_bytes(int list) {
  return kListStages * kStageBytes + 8 * int64_t(list) * 8 + kTile * 8;
}

// out[i][blockIdx.y][0, k) = ordered keys of the k best of the share, descending, kEmptyKey where there are fewer.
//
// lists: scratch, `list` keys for each row of each block; list is a power of two of at least k + 128. A row keeps
// theta, the value of its k-th best so far (-inf before that): once it is warm most tiles only compare. What is above
// theta is appended to the row's list in any order; before a tile could overflow it, a warp sorts the list, keeps the
// k best and raises theta. Keys come in ascending index, so one equal to theta never displaces a kept one.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    topk_kernel(RowSearch<T> job, int k, int list, int64_t* lists, int64_t* out) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const TileRange range = share_of_tiles(job, first_row);
  const Places at;
  const Choice<T> choice{job};
  unsigned char* shared = dynamic_shared();
  auto sorted = reinterpret_cast<int64_t*>(shared + kListStages * kStageBytes) + threadIdx.x / 32 * list;
  auto theta = reinterpret_cast<float*>(shared + kListStages * kStageBytes + 8 * int64_t(list) * 8);
  auto count = reinterpret_cast<int*>(theta + kTile);
  int64_t* own_lists = lists + (blockIdx.x * static_cast<int64_t>(gridDim.y) + blockIdx.y) * kTile * list;
  if (threadIdx.x < kTile) theta[threadIdx.x] = -INFINITY, count[threadIdx.x] = 0;

  TileStream<T, kListStages> products({job.queries, job.rows, first_row}, {job.keys, job.columns, 0}, range.first,
                                      range.count, job.depth, shared);
  for (int64_t tile = range.first; tile < range.first + range.count; ++tile) {
    Accumulators acc;
    products.next(acc, at);
    __syncthreads();  // theta and count of the last tile are complete, also where a row has no depth
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = at.row(m, h);
        const float bar = theta[row];
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const float s = acc[m][n][2 * h + b];
            const int64_t j = tile * kTile + at.column(n, b);
            if (s > bar && choice.allowed(first_row + row, j))
              own_lists[int64_t(row) * list + atomicAdd(&count[row], 1)] = ordered_key(s, choice.key_id(j));
          }
      }
    __syncthreads();
    const bool last = tile + 1 == range.first + range.count;
    for (int row = threadIdx.x / 32; row < kTile; row += kTileThreads / 32) {
      const int held = count[row];
      const bool first_bar = held >= k && theta[row] == -INFINITY;
      if (last || (held <= list - kTile && !first_bar)) continue;  // the same for the whole warp
      for (int e = at.lane; e < list; e += 32)
        sorted[e] = e < held ? own_lists[int64_t(row) * list + e] : kEmptyKey;
      sort_descending(sorted, list, at.lane);
      for (int e = at.lane; e < k; e += 32)
        own_lists[int64_t(row) * list + e] = sorted[e];
      if (at.lane == 0) count[row] = k, theta[row] = key_value(sorted[k - 1]);
      __syncwarp();
    }
  }
  __syncthreads();
  for (int row = threadIdx.x / 32; row < kTile && first_row + row < job.rows; row += kTileThreads / 32) {
    const int held = count[row];
    for (int e = at.lane; e < list; e += 32)
      sorted[e] = e < held ? own_lists[int64_t(row) * list + e] : kEmptyKey;
    sort_descending(sorted, list, at.lane);
    int64_t* row_out = out + ((first_row + row) * gridDim.y + blockIdx.y) * k;
    for (int e = at.lane; e < k; e += 32)
      row_out[e] = sorted[e];
    __syncwarp();
  }
}

// out[i][j] = the ordered key of pair (i, j), by the caller's key_ids; kEmptyKey where it may not be chosen or is NaN
// or -inf. One block, one tile: the unfused route, for long lists.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<T>)
    ordered_keys_kernel(RowSearch<T> job, int64_t first_row, int64_t* out) {
  const int64_t first_tile_row = first_row + static_cast<int64_t>(blockIdx.y) * kTile;
  const Places at;
  const Choice<T> choice{job};
  Accumulators acc;
  TileStream<T, kRowStages> products({job.queries, job.rows, first_tile_row}, {job.keys, job.columns, 0}, blockIdx.x, 1,
                                     job.depth, dynamic_shared());
  products.next(acc, at);
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t i = first_tile_row + at.row(m, e / 2), j = int64_t(blockIdx.x) * kTile + at.column(n, e % 2);
        if (i >= job.rows || j >= job.columns) continue;
        const bool chosen = acc[m][n][e] > -INFINITY && choice.allowed(i, j);
        out[(i - first_row) * job.columns + j] = chosen ? ordered_key(acc[m][n][e], choice.key_id(j)) : kEmptyKey;
      }
}

}  // namespace hpk::gpu
