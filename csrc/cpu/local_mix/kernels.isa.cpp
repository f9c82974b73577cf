#include "cpu/local_mix/local_mix.h"

#include <algorithm>
#include <limits>

#include "cpu/runtime/thread_pool.h"
#include "cpu/vector/exp.h"
#include "cpu/vector/simd.h"
#include "cpu/vector/tile.h"

namespace hpk::HPK_ISA {
namespace {

// ---- the neighbours of a token

struct Neighbors {
  int count = 0;  // 4, 6 or 9 on grids of at least 2 x 2
  int slot[kTaps];
  int64_t token[kTaps];
};

Neighbors neighbors_of(int64_t token, int64_t height, int64_t width) {
  Neighbors found;
  const int64_t y = token / width, x = token % width;
  for (int n = 0; n < kTaps; ++n) {
    const int64_t yy = y + n / 3 - 1, xx = x + n % 3 - 1;
    if (yy < 0 || yy >= height || xx < 0 || xx >= width) continue;
    found.slot[found.count] = n;
    found.token[found.count++] = yy * width + xx;
  }
  return found;
}

// ---- two neighbouring order statistics of a row: histogram, then sort the few values of the bucket that holds them

constexpr int kBuckets = 256;

template <class T>
struct OrderPair {
  T low, high;  // the k-th and (k+1)-th smallest
};

template <class T>
OrderPair<T> sort_and_pick(T* values, int64_t count, int64_t k) {
  for (int64_t i = 1; i < count; ++i) {
    const T value = values[i];
    int64_t j = i;
    for (; j > 0 && values[j - 1] > value; --j)
      values[j] = values[j - 1];
    values[j] = value;
  }
  return {values[k], values[std::min(k + 1, count - 1)]};
}

// Histogram of `values` over kBuckets equal intervals of [smallest, largest]; false if they cannot be told apart.
template <class T>
bool bucket_values(const T* values, int64_t count, T smallest, T largest, uint8_t* bucket,
                   int32_t (&histogram)[kBuckets]) {
  const T scale = T(kBuckets - 1) / (largest - smallest);
  if (!(scale > 0 && scale <= std::numeric_limits<T>::max())) return false;
  for (int64_t i = 0; i < count; ++i)
    bucket[i] = static_cast<uint8_t>(static_cast<int32_t>((values[i] - smallest) * scale));
  std::fill(histogram, histogram + kBuckets, 0);
  for (int64_t i = 0; i < count; ++i)
    ++histogram[bucket[i]];
  return true;
}

// The k-th and (k+1)-th smallest of values, whose buckets are given; `work` holds `count` values, `spare` `count`
// bytes.
template <class T>
OrderPair<T> pick(const T* values, int64_t count, int64_t k, const uint8_t* bucket,
                  const int32_t (&histogram)[kBuckets], T* work, uint8_t* spare) {
  int first = 0;
  int64_t before = 0;
  for (; before + histogram[first] <= k; ++first)
    before += histogram[first];
  int last = first;
  if (k + 1 < count)
    for (int64_t reached = before + histogram[first]; reached <= k + 1; reached += histogram[last])
      ++last;
  if (last != first) {  // the k-th is the largest of its bucket, the next one the smallest of the other
    OrderPair<T> pair{std::numeric_limits<T>::lowest(), std::numeric_limits<T>::max()};
    for (int64_t i = 0; i < count; ++i) {
      if (bucket[i] == first) pair.low = std::max(pair.low, values[i]);
      if (bucket[i] == last) pair.high = std::min(pair.high, values[i]);
    }
    return pair;
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    work[kept] = values[i];
    kept += bucket[i] == first;
  }
  k -= before;
  constexpr int64_t kSortable = 48;
  if (kept <= kSortable) return sort_and_pick(work, kept, k);
  const auto ends = std::minmax_element(work, work + kept);
  const T smallest = *ends.first, largest = *ends.second;
  if (smallest == largest) return {smallest, largest};
  int32_t finer[kBuckets];
  // The extremes fall into different buckets, so the recursion ends; 256-fold narrowing makes it a level or two deep.
  if (!bucket_values(work, kept, smallest, largest, spare, finer)) return sort_and_pick(work, kept, k);
  Scratch<T> deeper_work(kept);
  Scratch<uint8_t> deeper_spare(kept);
  return pick(work, kept, k, spare, finer, deeper_work.get(), deeper_spare.get());
}

// torch.quantile's linear interpolation between order statistics
template <class T>
T interpolate(OrderPair<T> pair, T weight) {
  const T step = pair.high - pair.low;
  return weight < T(0.5) ? pair.low + weight * step : pair.high - (T(1) - weight) * step;
}

// ---- weights

template <class T>
struct RowScratch {
  T* work;
  uint8_t *bucket, *spare;
};

// Scratch for a row of `tokens` logits, one for each worker.
template <class T>
class RowScratches {
 public:
  RowScratches(int64_t tokens, int64_t workers)
      : padded_((tokens + 63) / 64 * 64), values_(padded_ * workers), bytes_(2 * padded_ * workers) {}
  RowScratch<T> of(int worker) const {
    uint8_t* bytes = bytes_.get() + 2 * padded_ * worker;
    return {values_.get() + padded_ * worker, bytes, bytes + padded_};
  }

 private:
  int64_t padded_;
  Scratch<T> values_;
  Scratch<uint8_t> bytes_;
};

int64_t worker_count(int threads, int64_t tasks) { return std::max<int64_t>(1, std::min<int64_t>(threads, tasks)); }

template <class T>
void mean_over_heads(const T* attention, int64_t heads, int64_t head_stride, int64_t tokens, T* row) {
  constexpr T kLowest =
      T(-1e30);  // stands for -inf, the log of a softmax that underflowed, so that quantiles stay numbers
  for (int64_t j = 0; j < tokens; ++j)
    row[j] = std::max(attention[j], kLowest);
  for (int64_t h = 1; h < heads; ++h)
    for (int64_t j = 0; j < tokens; ++j)
      row[j] += std::max(attention[h * head_stride + j], kLowest);
  const T count = static_cast<T>(heads);
  for (int64_t j = 0; j < tokens; ++j)
    row[j] /= count;
}

// log sum_j exp(clamp(row_j, low, high) - high)
template <class T>
T clamped_log_sum_exp(const T* row, int64_t tokens, T low, T high) {
  Vec<T> part{};
  int64_t j = 0;
  for (; j + kLanes<T> <= tokens; j += kLanes<T>)
    part += exp<T>(min(max(load(row + j), splat(low)), splat(high)) - splat(high));
  T total = sum<T>(part);
  for (; j < tokens; ++j)
    total += std::exp(std::min(std::max(row[j], low), high) - high);
  return std::log(total);
}

// args: WeightsArgs or WeightsQkArgs; row: the token's mean logits
template <class T, class Args>
void token_weights(const Args& args, int64_t token, const T* row, const RowScratch<T>& s, T* weights) {
  const int64_t tokens = args.height * args.width;
  T smallest = row[0], largest_value = row[0], zero = 0;  // zero: NaN as soon as a logit is not finite
  for (int64_t j = 0; j < tokens; ++j) {
    smallest = std::min(smallest, row[j]);
    largest_value = std::max(largest_value, row[j]);
    zero += row[j] * 0;
  }
  const Neighbors near = neighbors_of(token, args.height, args.width);
  std::fill(weights, weights + kTaps, T(0));
  if (zero != 0) {
    for (int n = 0; n < near.count; ++n)
      weights[near.slot[n]] = zero;
    return;
  }
  T low = smallest, high = largest_value;
  int32_t histogram[kBuckets];
  if (bucket_values(row, tokens, smallest, largest_value, s.bucket, histogram)) {
    const auto quantile = [&](double q) {
      const double position = q * static_cast<double>(tokens - 1);
      const int64_t k = static_cast<int64_t>(position);
      return interpolate(pick(row, tokens, k, s.bucket, histogram, s.work, s.spare), static_cast<T>(position - k));
    };
    low = quantile(args.low_quantile);
    high = quantile(args.high_quantile);
  }
  const T lse = clamped_log_sum_exp(row, tokens, low, high);
  const T threshold = lse - std::log(static_cast<T>(tokens));  // relative to `high`, so that a constant row keeps all
  for (int n = 0; n < near.count; ++n) {
    const T c = std::min(std::max(row[near.token[n]], low), high) - high;
    if (c >= threshold)
      weights[near.slot[n]] = static_cast<T>(args.sigma) * std::exp(c - lse) / static_cast<T>(near.count);
  }
}

template <class T>
void weights_of(const WeightsArgs<T>& args) {
  constexpr int64_t kRows = 16;  // per task
  const int64_t tokens = args.height * args.width, padded = (tokens + 63) / 64 * 64;
  const int64_t tasks = (args.batch * tokens + kRows - 1) / kRows;
  const int64_t workers = worker_count(args.threads, tasks);
  Scratch<T> rows(padded * workers);
  const RowScratches<T> scratch(tokens, workers);
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    T* row = rows.get() + padded * worker;
    for (int64_t i = task * kRows; i < std::min(args.batch * tokens, (task + 1) * kRows); ++i) {
      const int64_t image = i / tokens, token = i % tokens;
      const T* logits = args.attention + (image * args.heads * tokens + token) * tokens;
      mean_over_heads(logits, args.heads, tokens * tokens, tokens, row);
      token_weights(args, token, row, scratch.of(worker), args.weights + i * kTaps);
    }
  });
}

// Keys are packed for a group of images at a time; then every task makes a panel of rows of logits and reduces it.
template <class T>
void weights_of(const WeightsQkArgs<T>& args) {
  using E = Engine<T>;
  constexpr int64_t kRows = 48;                       // of a panel: a multiple of MR
  constexpr int64_t kPackedBytes = int64_t{4} << 20;  // of a group's keys, where more than one image fits
  const int64_t tokens = args.height * args.width, ld = E::round_cols(tokens), depth = args.depth;
  const int64_t image_size = E::b_size(tokens, depth);
  const int64_t group = std::max<int64_t>(
      1, std::min<int64_t>(args.batch, kPackedBytes / (image_size * static_cast<int64_t>(sizeof(T)))));
  const int64_t blocks = ld / E::NR, panels = (tokens + kRows - 1) / kRows;
  const int64_t workers = worker_count(args.threads, group * panels);
  Scratch<T> packed_keys(group * image_size);
  Scratch<T> logits(workers * kRows * ld);
  const RowScratches<T> scratch(tokens, workers);
  const T scale = static_cast<T>(args.scale);
  for (int64_t first = 0; first < args.batch; first += group) {
    const int64_t images = std::min(group, args.batch - first);
    parallel_for(args.threads, images * blocks, [&](int64_t task, int) {
      const int64_t image = task / blocks, j = task % blocks * E::NR;
      const T* keys = args.keys.data + (first + image) * args.keys.image_stride + j * args.keys.stride;
      pack_rows<E::NR>(keys, args.keys.stride, nullptr, std::min<int64_t>(E::NR, tokens - j), depth,
                       packed_keys.get() + image * image_size + j * depth);
    });
    parallel_for(args.threads, images * panels, [&](int64_t task, int worker) {
      const int64_t image = task / panels, i0 = task % panels * kRows, rows = std::min(kRows, tokens - i0);
      T* panel = logits.get() + worker * kRows * ld;
      const T* queries = args.queries.data + (first + image) * args.queries.image_stride + i0 * args.queries.stride;
      multiply<E>(rows, tokens, depth, rows_of(queries, args.queries.stride), packed_keys.get() + image * image_size,
                  panel, ld);
      for (int64_t r = 0; r < rows; ++r) {
        T* row = panel + r * ld;
        for (int64_t j = 0; j < tokens; ++j)
          row[j] *= scale;
        token_weights(args, i0 + r, row, scratch.of(worker),
                      args.weights + ((first + image) * tokens + i0 + r) * kTaps);
      }
    });
  }
}

// ---- mixing

// out[d] = sum_n weight[n] source[n][d]
template <class T>
void weighted_sum(int count, const T* const* source, const T* weight, int64_t depth, T* out) {
  int64_t d = 0;
  for (; d + kLanes<T> <= depth; d += kLanes<T>) {
    Vec<T> total{};
    for (int n = 0; n < count; ++n)
      total += splat(weight[n]) * load(source[n] + d);
    store(out + d, total);
  }
  for (; d < depth; ++d) {
    T total = 0;
    for (int n = 0; n < count; ++n)
      total += weight[n] * source[n][d];
    out[d] = total;
  }
}

template <class T>
T dot(const T* a, const T* b, int64_t depth) {
  Vec<T> part{};
  int64_t d = 0;
  for (; d + kLanes<T> <= depth; d += kLanes<T>)
    part += load(a + d) * load(b + d);
  T total = sum<T>(part);
  for (; d < depth; ++d)
    total += a[d] * b[d];
  return total;
}

// Calls f(row i of all images, first row of its image, its neighbours) for every token, several to a task.
template <class T, class F>
void for_each_token(const MixArgs<T>& args, F&& f) {
  const int64_t tokens = args.height * args.width;
  const int64_t rows = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.depth));
  parallel_for(args.threads, (args.batch * tokens + rows - 1) / rows, [&](int64_t task, int) {
    for (int64_t i = task * rows; i < std::min(args.batch * tokens, (task + 1) * rows); ++i)
      f(i, i / tokens * tokens, neighbors_of(i % tokens, args.height, args.width));
  });
}

template <class T>
void mix(const MixArgs<T>& args, T* out) {
  for_each_token(args, [&](int64_t i, int64_t base, const Neighbors& near) {
    const T* source[kTaps];
    T weight[kTaps];
    for (int n = 0; n < near.count; ++n) {
      source[n] = args.code + (base + near.token[n]) * args.depth;
      weight[n] = args.weights[i * kTaps + near.slot[n]];
    }
    weighted_sum(near.count, source, weight, args.depth, out + i * args.depth);
  });
}

template <class T>
void mix_grad(const MixArgs<T>& args, const T* g, T* grad_code, T* grad_weights) {
  for_each_token(args, [&](int64_t i, int64_t base, const Neighbors& near) {
    if (grad_code) {  // the neighbour at slot n sees this token at its slot 8 - n
      const T* source[kTaps];
      T weight[kTaps];
      for (int n = 0; n < near.count; ++n) {
        source[n] = g + (base + near.token[n]) * args.depth;
        weight[n] = args.weights[(base + near.token[n]) * kTaps + kTaps - 1 - near.slot[n]];
      }
      weighted_sum(near.count, source, weight, args.depth, grad_code + i * args.depth);
    }
    if (grad_weights) {
      std::fill(grad_weights + i * kTaps, grad_weights + (i + 1) * kTaps, T(0));
      for (int n = 0; n < near.count; ++n)
        grad_weights[i * kTaps + near.slot[n]] =
            dot(g + i * args.depth, args.code + (base + near.token[n]) * args.depth, args.depth);
    }
  });
}

}  // namespace

void neighbor_weights(const WeightsArgs<float>& args) { weights_of(args); }
void neighbor_weights(const WeightsArgs<double>& args) { weights_of(args); }
void neighbor_weights_qk(const WeightsQkArgs<float>& args) { weights_of(args); }
void neighbor_weights_qk(const WeightsQkArgs<double>& args) { weights_of(args); }
void neighbor_mix(const MixArgs<float>& args, float* out) { mix(args, out); }
void neighbor_mix(const MixArgs<double>& args, double* out) { mix(args, out); }
void neighbor_mix_grad(const MixArgs<float>& args, const float* g, float* grad_code, float* grad_weights) {
  mix_grad(args, g, grad_code, grad_weights);
}
void neighbor_mix_grad(const MixArgs<double>& args, const double* g, double* grad_code, double* grad_weights) {
  mix_grad(args, g, grad_code, grad_weights);
}

}  // namespace hpk::HPK_ISA
