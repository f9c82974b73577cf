// The nearest centroid of each row, its distance, and the sums of the rows of each cluster.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common/tile.cuh"
#include "cuda/common/vector.cuh"
#include "shared/ordered_key.h"

namespace hpk::gpu {

// fp32 directions meet 16-bit rows as three numbers of 16 bits, which hold all 24 bits of each.
template <class T>
constexpr int kDirectionParts = std::is_same_v<T, float> ? 1 : 3;

template <class T>
using ScorePlaces = TilePlaces<4, 2, 2, 4, kDirectionParts<T>>;  // 128 rows, 64 directions

constexpr int kScoreStages = 2;
constexpr int kRowsAtOnce = 4;  // of a warp, whose loads for the distances are under way together

template <class T>
struct ClusterJob {
  const T* x;              // (rows, depth)
  const T* directions;     // (tiles, parts, 64, depth)
  const float* bias;       // (tiles * 64,), -inf past the last cluster
  const float* centroids;  // (clusters, depth)
  int64_t rows, depth;
  int tiles;  // of 64 directions; 0: all rows belong to cluster 0
};

template <class T>
constexpr int kAssignBytes = kScoreStages * ScorePlaces<T>::kStageBytes;

// labels[i] = argmax_k <x_i, direction_k> + bias_k, the lower k of equal ones, 0 where no score is a number;
// distances[i] = |x_i - centroid_label|^2. A block has 128 rows.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    cluster_assign_kernel(ClusterJob<T> job, int64_t* labels, float* distances) {
  using Shape = ScorePlaces<T>;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shape::kRows;
  const Shape at;
  TileStream<T, kScoreStages, Shape> products({job.x, job.rows, first_row},
                                              {job.directions, int64_t(job.tiles) * Shape::kColumnRows, 0}, 0,
                                              job.tiles, job.depth, dynamic_shared());
  float best[Shape::kM][2];
  int where[Shape::kM][2];
#pragma unroll
  for (int m = 0; m < Shape::kM; ++m)
    best[m][0] = best[m][1] = -INFINITY, where[m][0] = where[m][1] = -1;
  for (int tile = 0; tile < job.tiles; ++tile) {
    typename Shape::Accumulators acc;
    products.next(acc, at);
#pragma unroll
    for (int n = 0; n < Shape::kN; ++n)
#pragma unroll
      for (int b = 0; b < 2; ++b) {  // ascending clusters: an equal score later is not better
        const int cluster = tile * Shape::kColumns + at.column(n, b);
        const float bias = job.bias[cluster];
#pragma unroll
        for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float score = acc[m][n][2 * h + b] + bias;
            if (score > best[m][h]) best[m][h] = score, where[m][h] = cluster;
          }
      }
  }
  __syncthreads();  // the buffers of the products become those of the warps' best
  auto of_warp = reinterpret_cast<int64_t (*)[Shape::kRows]>(dynamic_shared());
  auto label_of = reinterpret_cast<int*>(of_warp[2]);
#pragma unroll
  for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t key = where[m][h] < 0 ? kEmptyKey : ordered_key(best[m][h], where[m][h]);
      for (int mask = 1; mask <= 2; mask *= 2) {
        const int64_t other = __shfl_xor_sync(kAllLanes, key, mask);
        key = other > key ? other : key;
      }
      if (at.lane % 4 == 0) of_warp[at.warp_column][at.row(m, h)] = key;
    }
  __syncthreads();
  if (threadIdx.x < Shape::kRows) {
    const int64_t key =
        of_warp[0][threadIdx.x] > of_warp[1][threadIdx.x] ? of_warp[0][threadIdx.x] : of_warp[1][threadIdx.x];
    const int label = key == kEmptyKey ? 0 : static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
    label_of[threadIdx.x] = label;
    if (first_row + threadIdx.x < job.rows) labels[first_row + threadIdx.x] = label;
  }
  __syncthreads();

  constexpr int kWarps = kTileThreads / 32;
  for (int group = threadIdx.x / 32; group < Shape::kRows / kRowsAtOnce; group += kWarps) {
    const T* rows[kRowsAtOnce];
    const float* centroids[kRowsAtOnce];
    float sums[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int row = group * kRowsAtOnce + r;
      const int64_t i = first_row + row < job.rows ? first_row + row : job.rows - 1;
      rows[r] = job.x + i * job.depth, centroids[r] = job.centroids + label_of[row] * job.depth, sums[r] = 0.0f;
    }
    constexpr int kWide = kVector<T>;
    for (int64_t d = at.lane * kWide; d < job.depth; d += 32 * kWide) {
      float x[kRowsAtOnce][kWide];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
        load_wide<T, kWide>(x[r], rows[r] + d);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
        for (int part = 0; part < kWide; part += 4) {
          float mu[4];
          load_wide<float, 4>(mu, centroids[r] + d + part);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float difference = x[r][part + e] - mu[e];
            sums[r] = fmaf(difference, difference, sums[r]);
          }
        }
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float sum = warp_sum(sums[r]);
      const int64_t i = first_row + group * kRowsAtOnce + r;
      if (at.lane == 0 && i < job.rows) distances[i] = sum;
    }
  }
}

// Sums over rows in the order of their labels: `order` lists the rows, `ordered` their labels, ascending. A run is 128
// of them. Within a run rows of one label have one sum, in fp32, kept at place run + label of `parts`: from one such
// sum to the next the run or the label goes up, so that no two share a place, and those of a cluster are neighbours.
constexpr int kRun = 128;

// parts (runs + clusters - 1, depth). A warp has a run and 32 chunks of 16 bytes of its rows.
template <class T>
__global__ void __launch_bounds__(kWarpThreads)
    cluster_sum_kernel(const T* x, int64_t rows, int64_t depth, const int64_t* order, const int* ordered,
                       float* parts) {
  constexpr int kWide = kVector<T>, kAhead = 8;
  const int lane = threadIdx.x % 32;
  const int64_t run = static_cast<int64_t>(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;
  const int64_t begin = run * kRun, end = begin + kRun < rows ? begin + kRun : rows;
  if (begin >= end) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + lane) * kWide;
  const bool inside = column < depth;
  float sum[kWide] = {};
  int label = ordered[begin];
  const auto store = [&] {
    float* to = parts + (run + label) * depth + column;
#pragma unroll
    for (int e = 0; e < kWide; e += 4)
      if (inside) store_wide<float, 4>(to + e, {sum[e], sum[e + 1], sum[e + 2], sum[e + 3]});
  };
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t place = first + lane < end ? first + lane : end - 1;
    const int64_t own_row = order[place];
    const int own_label = ordered[place], count = end - first < 32 ? static_cast<int>(end - first) : 32;
    for (int from = 0; from < count; from += kAhead) {
      PackedOf<T, kWide> packed[kAhead];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const int64_t row = __shfl_sync(kAllLanes, own_row, from + r);
        packed[r] = {};
        if (inside) packed[r] = load_packed<16>(x + row * depth + column);
      }
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const int next = __shfl_sync(kAllLanes, own_label, from + r);
        if (from + r >= count) continue;
        if (next != label) {
          store();
          label = next;
#pragma unroll
          for (int e = 0; e < kWide; ++e)
            sum[e] = 0.0f;
        }
        float values[kWide];
        widen<T, kWide>(values, packed[r]);
#pragma unroll
        for (int e = 0; e < kWide; ++e)
          sum[e] += values[e];
      }
    }
  }
  store();
}

// sums[k] = the parts of cluster k in fp64, every eighth by one warp, the warps' in their order. starts (clusters +
// 1,): the first place of each label. Block (k, y): cluster k, columns 32 y ... + 31.
static __global__ void __launch_bounds__(kWarpThreads)
    cluster_total_kernel(const float* parts, const int64_t* starts, int64_t depth, float* sums) {
  constexpr int kWarps = kWarpThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t cluster = blockIdx.x, column = blockIdx.y * 32 + lane;
  const int64_t begin = starts[cluster], end = starts[cluster + 1];
  double sum = 0.0;
  if (begin < end && column < depth) {
    const float* from = parts + cluster * depth + column;
#pragma unroll 4
    for (int64_t run = begin / kRun + warp; run <= (end - 1) / kRun; run += kWarps)
      sum += from[run * depth];
  }
  auto of_warp = reinterpret_cast<double (*)[32]>(dynamic_shared());
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= depth) return;
  for (int w = 1; w < kWarps; ++w)
    sum += of_warp[w][lane];
  sums[cluster * depth + column] = static_cast<float>(sum);
}

}  // namespace hpk::gpu
