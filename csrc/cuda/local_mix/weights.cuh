// Neighbour weights: nine numbers of a token from its row of mean-head logits. A warp works on one row, which it keeps
// in shared memory.
#pragma once

#include <cmath>

#include "cuda/common/tile.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/local_mix/grid.cuh"
#include "shared/bits.h"

namespace hpk::gpu {

constexpr float kLowestLogit = -1e30f;  // stands for -inf, so that quantiles stay numbers
constexpr int kBuckets = 256;
constexpr int kLogitStages = 3;

// An order statistic and the weight of the next one: torch's linear interpolation.
struct Quantile {
  int rank;
  float fraction;
};

struct WeightOptions {
  Grid grid;
  Quantile low, high;
  float sigma;
};

// Words of shared memory that a warp takes: its row, the histogram, the candidates of a rank.
HPK_HOST_DEVICE constexpr int64_t warp_words(int64_t tokens) { return tokens + kBuckets + 32; }

// uint32 in the order of the floats; -0.0 counts as 0.0.
__device__ inline uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float of_ordered_bits(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The row of a warp, without NaN or infinity, and its exact order statistics.
//
// A histogram of 256 equal intervals says which interval holds a rank; the few values of that interval are compared
// with each other. Where an interval holds more than a warp can, or the range has no intervals (all equal, or wider
// than fp32), the statistic is found bit by bit.
class Row {
 public:
  __device__ Row(const float* values, int count, int* histogram, float* candidates, int lane)
      : values_(values), count_(count), histogram_(histogram), candidates_(candidates), lane_(lane) {
    float largest = -INFINITY;
    lowest_ = INFINITY;
    for (int j = lane; j < count; j += 32)
      largest = fmaxf(largest, values[j]), lowest_ = fminf(lowest_, values[j]);
    largest = warp_max(largest), lowest_ = warp_min(lowest_);
    buckets_per_unit_ = (kBuckets - 1) / (largest - lowest_);
    has_buckets_ = buckets_per_unit_ > 0.0f && buckets_per_unit_ < INFINITY;
    if (!has_buckets_) return;
    for (int b = lane; b < kBuckets; b += 32)
      histogram[b] = 0;
    __syncwarp();
    for (int j = lane; j < count; j += 32)
      atomicAdd(&histogram[bucket_of(values[j])], 1);
    __syncwarp();
  }

  __device__ float quantile(Quantile q) {
    const float statistic = order_statistic(q.rank);
    int up_to = 0;
    float above = INFINITY;
    for (int j = lane_; j < count_; j += 32) {
      const float value = values_[j];
      if (value <= statistic)
        ++up_to;
      else
        above = fminf(above, value);
    }
    up_to = warp_sum(up_to), above = warp_min(above);
    const float next = up_to > q.rank + 1 || q.rank + 1 >= count_ ? statistic : above;
    const float step = next - statistic;
    return q.fraction < 0.5f ? statistic + q.fraction * step : next - step * (1.0f - q.fraction);
  }

 private:
  __device__ int bucket_of(float value) const { return static_cast<int>((value - lowest_) * buckets_per_unit_); }

  // The value with exactly `rank` values before it in ascending order.
  __device__ float order_statistic(int rank) {
    if (!has_buckets_) return bisect(rank);
    constexpr int kOwn = kBuckets / 32;  // buckets of a lane
    int own = 0;
    for (int b = 0; b < kOwn; ++b)
      own += histogram_[lane_ * kOwn + b];
    int reached = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, reached, distance);
      if (lane_ >= distance) reached += below;
    }
    int before = reached - own, bucket = lane_ * kOwn;
    const bool holds = before <= rank && rank < reached;
    if (holds)
      for (; before + histogram_[bucket] <= rank; ++bucket)
        before += histogram_[bucket];
    const int holder = __ffs(__ballot_sync(kAllLanes, holds)) - 1;
    before = __shfl_sync(kAllLanes, before, holder), bucket = __shfl_sync(kAllLanes, bucket, holder);
    return histogram_[bucket] <= 32 ? pick(bucket, rank - before) : bisect(rank);
  }

  // The value of a rank among those of a bucket, at most one a lane.
  __device__ float pick(int bucket, int rank) {
    int found = 0;
    for (int first = 0; first < count_; first += 32) {
      const bool inside = first + lane_ < count_ && bucket_of(values_[first + lane_]) == bucket;
      const uint32_t votes = __ballot_sync(kAllLanes, inside);
      if (inside) candidates_[found + __popc(votes & ((1u << lane_) - 1u))] = values_[first + lane_];
      found += __popc(votes);
    }
    __syncwarp();
    const float own = lane_ < found ? candidates_[lane_] : INFINITY;
    int before = 0;
    for (int c = 0; c < found; ++c)
      before += candidates_[c] < own || (candidates_[c] == own && c < lane_);
    const int holder = __ffs(__ballot_sync(kAllLanes, lane_ < found && before == rank)) - 1;
    __syncwarp();  // the next call writes the candidates
    return __shfl_sync(kAllLanes, own, holder);
  }

  __device__ float bisect(int rank) const {
    uint32_t found = 0;  // the largest number with at most `rank` values below it
#pragma unroll 1
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
      int below = 0;
      for (int j = lane_; j < count_; j += 32)
        below += ordered_bits(values_[j]) < (found | bit);
      if (warp_sum(below) <= rank) found |= bit;
    }
    return of_ordered_bits(found);
  }

  const float* values_;
  int count_;
  int* histogram_;
  float* candidates_;
  int lane_;
  float lowest_, buckets_per_unit_;
  bool has_buckets_;
};

// The nine weights of `token` from its row of logits (see ops/local_mix/README.md).
__device__ inline void write_weights(const float* values, int token, bool number, const WeightOptions& options,
                                     int* histogram, float* candidates, float* out) {
  const Grid grid = options.grid;
  const int lane = threadIdx.x % 32, tokens = grid.tokens();
  float low = 0.0f, high = 0.0f, total = NAN;
  if (number) {  // the same for the whole warp
    Row row(values, tokens, histogram, candidates, lane);
    low = row.quantile(options.low), high = row.quantile(options.high);
    float part = 0.0f;
    for (int j = lane; j < tokens; j += 32)
      part += expf(fminf(fmaxf(values[j], low), high) - high);
    total = warp_sum(part);
  }
  if (lane >= kTaps) return;
  const int y = token / grid.width, x = token % grid.width;
  const int rows = 1 + grid.has(y - 1, x) + grid.has(y + 1, x), columns = 1 + grid.has(y, x - 1) + grid.has(y, x + 1);
  float weight = 0.0f;
  if (grid.has_tap(y, x, lane)) {
    const float tap = expf(fminf(fmaxf(values[token + grid.step_to(lane)], low), high) - high);
    if (!(tap * tokens < total)) weight = options.sigma * tap / (total * (rows * columns));
  }
  out[lane] = weight;
}

// attention: logits of (images, heads, tokens, tokens), each row from an address aligned to Width elements on.
template <class T>
struct LogitRows {
  const T* attention;
  int64_t images, image_stride, head_stride, row_stride;
  int heads;
};

// out (images, tokens, 9). One warp, one token; a NaN or infinite mean makes all taps of its token NaN.
template <class T, int Width>
__global__ void __launch_bounds__(kWarpThreads)
    neighbor_weights_kernel(LogitRows<T> rows, WeightOptions options, float* out) {
  const int tokens = options.grid.tokens(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + warp;
  if (row >= rows.images * tokens) return;
  auto values = reinterpret_cast<float*>(dynamic_shared()) + warp * warp_words(tokens);
  auto histogram = reinterpret_cast<int*>(values + tokens);
  const int64_t image = row / tokens, token = row % tokens;
  const T* logits = rows.attention + image * rows.image_stride + token * rows.row_stride;
  float zero = 0.0f;  // NaN if a mean is not finite
  for (int j = lane * Width; j < tokens; j += 32 * Width) {
    float mean[Width] = {};
#pragma unroll 4
    for (int head = 0; head < rows.heads; ++head) {
      float v[Width];
      load_wide<T>(v, logits + head * rows.head_stride + j);
#pragma unroll
      for (int e = 0; e < Width; ++e)
        mean[e] += v[e] < kLowestLogit ? kLowestLogit : v[e];
    }
#pragma unroll
    for (int e = 0; e < Width; ++e) {
      if (j + e >= tokens) break;
      values[j + e] = mean[e] / rows.heads;
      zero += values[j + e] * 0.0f;
    }
  }
  const bool number = warp_sum(zero) == 0.0f;
  __syncwarp();
  write_weights(values, static_cast<int>(token), number, options, histogram, values + tokens + kBuckets,
                out + row * kTaps);
}

template <class T>
struct LogitProducts {
  const T *queries, *keys;  // (images, tokens, depth), the heads side by side
  int tokens;
  int64_t depth, stride;
  float factor;
  float* out;  // (images, tokens, stride); columns from `tokens` on are not written
};

// out_ij = factor <q_i, k_j> of image blockIdx.z: with the heads side by side the mean over them is one product.
template <class T>
__global__ void __launch_bounds__(kTileThreads) mean_logits_kernel(LogitProducts<T> job) {
  const int64_t image_rows = int64_t(blockIdx.z) * job.tokens;
  const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  const Places at;
  Accumulators acc;
  using Rows = ConsecutiveRows<T>;
  TileStream<T, kLogitStages> products(Rows(job.queries + image_rows * job.depth, job.tokens, first_row),
                                       Rows(job.keys + image_rows * job.depth, job.tokens, 0), blockIdx.x, 1, job.depth,
                                       dynamic_shared());
  products.next(acc, at);
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_row + at.row(m, e / 2), j = first_column + at.column(n, e % 2);
        if (i < job.tokens && j < job.tokens) job.out[(image_rows + i) * job.stride + j] = acc[m][n][e] * job.factor;
      }
}

}  // namespace hpk::gpu
