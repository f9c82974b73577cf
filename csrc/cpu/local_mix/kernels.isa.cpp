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

// ---- rows of logits: whole vectors, infinite behind their last value

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

template <class T>
int64_t count_of(Mask<T> counts) {
  return static_cast<int64_t>(sum<T>(__builtin_convertvector(counts, Vec<T>)));
}

template <class T>
T least(Vec<T> v) {
  return -largest<T>(-v);
}

template <class T>
int64_t whole_vectors(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
struct Row {
  T* values;
  int64_t count;
  T low, high;  // no value is below, none above
  bool finite;

  int64_t end() const { return whole_vectors<T>(count); }
};

// Row of vectors values_at(j, loader), which reads what it needs with loader(address).
template <class T, class F>
Row<T> make_row(T* values, int64_t count, F&& values_at) {
  Vec<T> low = splat(kInfinity<T>), high = -low, zero{};  // zero: NaN once a value is not finite
  const auto take = [&](int64_t j, Vec<T> v) {
    low = min(v, low), high = max(v, high);
    zero += v * splat(T(0));
    store(values + j, v);
  };
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>)
    take(j, values_at(j, [](const T* at) { return load(at); }));
  if (j < count) {
    take(j, values_at(j, [&](const T* at) { return load_part(at, count - j); }));  // zeros in the other lanes
    std::fill(values + count, values + j + kLanes<T>, kInfinity<T>);
  }
  return {values, count, least<T>(low), largest<T>(high), sum<T>(zero) == 0};
}

// Where the order statistics of ranks `rank` and rank + 1 are: values from `low` on and below `end`, of ranks `before`
// to reached - 1. None that lies there is above `high`.
template <class T>
struct Interval {
  int64_t rank, before, reached;
  T low, high, end;

  Interval(const Row<T>& row, int64_t rank)
      : rank(rank), before(0), reached(row.count), low(row.low), high(row.high), end(kInfinity<T>) {}

  bool narrow_enough() const { return reached - before <= 2; }

  // Half-way between the middle and where `rank` would lie if the values were spread evenly; above `low` where the ends
  // differ, not above `high`.
  T pivot() const {
    const T even = static_cast<T>(rank + 1 - before) / static_cast<T>(std::max<int64_t>(1, reached - before));
    const T share = T(0.25) + T(0.5) * even;
    const T value = std::min(std::max((1 - share) * low + share * high, low), high);
    return value > low ? value : high;
  }

  // A pivot with rank + 1 values below it lies between the two, and becomes both ends.
  void narrow(T pivot, int64_t below) {
    if (below <= rank + 1) low = pivot, before = below;
    if (below > rank) high = end = pivot, reached = below;
  }
};

template <class T>
struct Ends {
  T first, last;
};

// The least value from `low` on and the largest below `end`; the interval's ends move there if they lie outside.
template <class T>
Ends<T> ends_of(const Row<T>& row, Interval<T>& at) {
  const Vec<T> low = splat(at.low), end = splat(at.end), infinite = splat(kInfinity<T>);
  Vec<T> first = infinite, last = -infinite;
  for (int64_t j = 0; j < row.end(); j += kLanes<T>) {
    const Vec<T> v = load(row.values + j);
    first = min(v >= low ? v : infinite, first);
    last = max(v < end ? v : -infinite, last);
  }
  const Ends<T> found{least<T>(first), largest<T>(last)};
  at.low = std::min(found.first, at.end), at.high = std::max(found.last, at.low);
  return found;
}

// torch.quantile's linear interpolation between two order statistics, whichever comes first
template <class T>
T interpolate(Ends<T> ends, T weight) {
  const T low = std::min(ends.first, ends.last), high = std::max(ends.first, ends.last), step = high - low;
  return weight < T(0.5) ? low + weight * step : high - (T(1) - weight) * step;
}

template <class T>
struct Quantiles {
  T low, high;
};

// Two quantiles of a finite row, by the algorithm of ops/local_mix/README.md.
template <class T>
Quantiles<T> quantiles_of(const Row<T>& row, double low, double high) {
  constexpr int kPivots = 12;  // that are tried before looking at what an interval holds
  const double last = static_cast<double>(row.count - 1);
  const auto rank = [&](double q) { return std::max<int64_t>(0, std::min<int64_t>(q * last, row.count - 2)); };
  Interval<T> a(row, rank(low)), b(row, rank(high));
  Ends<T> of_a, of_b;
  do {
    for (int step = 0; step < kPivots && !(a.narrow_enough() && b.narrow_enough()); ++step) {
      const T pivot_a = a.pivot(), pivot_b = b.pivot();
      const Vec<T> at_a = splat(pivot_a), at_b = splat(pivot_b);
      Mask<T> below_a{}, below_b{};
      for (int64_t j = 0; j < row.end(); j += kLanes<T>) {
        const Vec<T> v = load(row.values + j);
        below_a -= v < at_a, below_b -= v < at_b;
      }
      a.narrow(pivot_a, count_of<T>(below_a)), b.narrow(pivot_b, count_of<T>(below_b));
    }
    of_a = ends_of(row, a), of_b = ends_of(row, b);
  } while ((!a.narrow_enough() && a.low < a.high) || (!b.narrow_enough() && b.low < b.high));
  return {interpolate(of_a, static_cast<T>(low * last - a.rank)),
          interpolate(of_b, static_cast<T>(high * last - b.rank))};
}

// ---- weights

int64_t worker_count(int threads, int64_t tasks) { return std::max<int64_t>(1, std::min<int64_t>(threads, tasks)); }

// args: WeightsArgs or WeightsQkArgs; row: the token's logits, times 1 / scale
template <class T, class Args>
void token_weights(const Args& args, int64_t token, const Row<T>& row, T scale, T* weights) {
  const Neighbors near = neighbors_of(token, args.height, args.width);
  std::fill(weights, weights + kTaps, T(0));
  if (!row.finite) {
    for (int n = 0; n < near.count; ++n)
      weights[near.slot[n]] = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  const Quantiles<T> bounds = quantiles_of(row, args.low_quantile, args.high_quantile);
  const auto exponentials = [&](Vec<T> v) {
    return exp<T>((min(max(v, splat(bounds.low)), splat(bounds.high)) - splat(bounds.high)) * splat(scale));
  };
  Vec<T> part{};
  for (int64_t j = 0; j < row.end(); j += kLanes<T>) {
    const Vec<T> v = load(row.values + j);
    part += v < splat(kInfinity<T>) ? exponentials(v) : Vec<T>{};
  }
  const T total = sum<T>(part);
  T taps[16] = {};
  for (int n = 0; n < near.count; ++n)
    taps[n] = row.values[near.token[n]];
  for (int n = 0; n < kTaps; n += kLanes<T>)
    store(taps + n, exponentials(load(taps + n)));
  const T factor = static_cast<T>(args.sigma) / (total * static_cast<T>(near.count));
  for (int n = 0; n < near.count; ++n)
    if (taps[n] * static_cast<T>(row.count) >= total) weights[near.slot[n]] = taps[n] * factor;
}

template <class T>
void weights_of(const WeightsArgs<T>& args) {
  constexpr int64_t kRows = 16;    // per task
  constexpr T kLowest = T(-1e30);  // stands for -inf, the log of a softmax that underflowed
  const int64_t tokens = args.height * args.width, padded = (tokens + 63) / 64 * 64, head_stride = tokens * tokens;
  const int64_t tasks = (args.batch * tokens + kRows - 1) / kRows;
  Scratch<T> rows(padded * worker_count(args.threads, tasks));
  const T scale = T(1) / static_cast<T>(args.heads);  // rows are sums over the heads
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    for (int64_t i = task * kRows; i < std::min(args.batch * tokens, (task + 1) * kRows); ++i) {
      const int64_t image = i / tokens, token = i % tokens;
      const T* logits = args.attention + (image * args.heads * tokens + token) * tokens;
      const auto sum_of_heads = [&](int64_t j, auto&& loader) {
        Vec<T> total{};
        for (int64_t h = 0; h < args.heads; ++h)
          total += max(splat(kLowest), loader(logits + h * head_stride + j));  // in this order NaN stays
        return total;
      };
      token_weights(args, token, make_row(rows.get() + padded * worker, tokens, sum_of_heads), scale,
                    args.weights + i * kTaps);
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
  const Vec<T> scale = splat(static_cast<T>(args.scale));
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
        T* logits_of_row = panel + r * ld;
        const auto scaled = [&](int64_t j, auto&& loader) { return loader(logits_of_row + j) * scale; };
        token_weights(args, i0 + r, make_row(logits_of_row, tokens, scaled), T(1),
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
