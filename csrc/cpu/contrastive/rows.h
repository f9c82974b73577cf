// Dot products of rows of X with chosen columns, and weighted sums of columns: the inner loops of the sparse
// contrastive kernels.
//
// `depth` is a multiple of the vector length, and a row's products with all columns have the same order of summation.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/contrastive/lanes.h"
#include "cpu/vector/simd.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int kGroup = 8;       // rows of a group: one bit each in the masks of a column
constexpr int64_t kChunk = 64;  // columns evaluated, and summed, at a time: long sums are sums of short ones
constexpr int kAccumulators = kVectorBytes == 64 ? 16 : 8;

// Lane l of the result sums the pair of lanes that differ in bit H, of a where bit H of l is clear and of b where it is
// set.
template <class T, int H, int... l>
inline Vec<T> fold(Vec<T> a, Vec<T> b, std::integer_sequence<int, l...>) {
  constexpr int n = kLanes<T>;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, ((l & H) ? n + l - H : l)...) +
         __builtin_shufflevector(a, b, ((l & H) ? n + l : l + H)...);
#else
  return __builtin_shuffle(a, b, Vec<IntegerOf<T>>{((l & H) ? n + l - H : l)...}) +
         __builtin_shuffle(a, b, Vec<IntegerOf<T>>{((l & H) ? n + l : l + H)...});
#endif
}

// v[0] becomes the vector whose lane l is the sum of v[l].
template <class T, int H = 1>
inline void sum_each(Vec<T>* v) {
  if constexpr (H < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T> / (2 * H); ++i)
      v[i] = fold<T, H>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes<T>>());
    sum_each<T, 2 * H>(v);
  }
}

// dots[c * kGroup + r] = <rows[r], x[columns[c]]>, r < R; the other lanes of a group become zero.
template <int R, class T>
void products(const T* const* rows, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* dots) {
  constexpr int C = kAccumulators / R, L = kLanes<T>;
  for (int64_t first = 0; first < count; first += C) {
    const T *column[C], *next[C];
    for (int c = 0; c < C; ++c) {
      column[c] = x + columns[std::min(first + c, count - 1)] * depth;
      next[c] = x + columns[std::min(first + C + c, count - 1)] * depth;
    }
    Vec<T> acc[C * R] = {};
    for (int64_t d = 0; d < depth; d += L) {
      Vec<T> value[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        value[c] = load(column[c] + d);
        __builtin_prefetch(next[c] + d);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> row = load(rows[r] + d);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c)
          acc[c * R + r] += row * value[c];
      }
    }
    T sums[C * R];
#pragma GCC unroll 8
    for (int a = 0; a < C * R; a += L) {
      sum_each<T>(acc + a);
      store(sums + a, acc[a]);
    }
    for (int c = 0; c < C && first + c < count; ++c)
      for (int r = 0; r < kGroup; ++r)
        dots[(first + c) * kGroup + r] = r < R ? sums[c * R + r] : T(0);
  }
}

// out[r][:] += sum_c weights[c * kGroup + r] x[columns[c]][:], V vectors of the depth at a time, from `from` on
template <int R, int V, class T>
int64_t mix_vectors(const T* weights, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* const* out,
                    int64_t from) {
  constexpr int L = kLanes<T>;
  for (; from + V * L <= depth; from += V * L) {
    Vec<T> acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        acc[r][v] = Vec<T>{};
    for (int64_t c = 0; c < count; ++c) {
      const T* column = x + columns[c] * depth + from;
      Vec<T> value[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        value[v] = load(column + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> weight = splat(weights[c * kGroup + r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
          acc[r][v] += weight * value[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        store(out[r] + from + v * L, load(out[r] + from + v * L) + acc[r][v]);
  }
  return from;
}

template <int R, class T>
void mix_columns(const T* weights, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* const* out) {
  constexpr int V = std::min(8, (kVectorBytes == 64 ? 24 : 8) / R);
  const int64_t done = mix_vectors<R, V>(weights, x, depth, columns, count, out, 0);
  mix_vectors<R, 1>(weights, x, depth, columns, count, out, done);
}

// out[columns[c] - first][:] += sum_r weights[c * kGroup + r] rows[r][:], with rows of `width` elements
template <int R, class T>
void scatter_rows(const T* weights, const T* const* rows, int64_t width, const int32_t* columns, int64_t count,
                  int64_t first, T* grad) {
  for (int64_t c = 0; c < count; ++c) {
    T* out = grad + (columns[c] - first) * width;
    Vec<T> weight[R];
    for (int r = 0; r < R; ++r)
      weight[r] = splat(weights[c * kGroup + r]);
#pragma GCC unroll 4
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      Vec<T> total = weight[0] * load(rows[0] + d);
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r)
        total += weight[r] * load(rows[r] + d);
      store(out + d, load(out + d) + total);
    }
  }
}

// f(R) with R = 1, 2, 4 or 8 as a compile-time constant, the smallest one >= rows
template <class F>
void with_row_count(int rows, F&& f) {
  if (rows > 4) return f(std::integral_constant<int, 8>());
  if (rows > 2) return f(std::integral_constant<int, 4>());
  if (rows > 1) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 1>());
}

// ---- one row against a list of columns

// dots[c] = <row, x[columns[c]]> for c < C; kLanes or more elements are written. Columns past `count` repeat the last
// one.
template <int C, class T>
void row_products_block(const T* row, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* dots) {
  constexpr int L = kLanes<T>, kSums = std::max(C, L);
  const T* column[C];
  for (int c = 0; c < C; ++c)
    column[c] = x + columns[std::min<int64_t>(c, count - 1)] * depth;
  Vec<T> acc[kSums] = {};
  for (int64_t d = 0; d < depth; d += L) {
    const Vec<T> value = load(row + d);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      acc[c] += value * load(column[c] + d);
  }
#pragma GCC unroll 8
  for (int a = 0; a < kSums; a += L) {
    sum_each<T>(acc + a);
    store(dots + a, acc[a]);
  }
}

constexpr int64_t kRowSlack = 16;  // elements that row_products may write past the last column

template <class T>
void row_products(const T* row, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* dots) {
  constexpr int C = kAccumulators;
  for (int64_t c = 0; c < count; c += C) {
    const int64_t left = count - c;
    if (left > C / 2) {
      row_products_block<C>(row, x, depth, columns + c, left, dots + c);
    } else if (left > C / 4) {
      row_products_block<C / 2>(row, x, depth, columns + c, left, dots + c);
    } else {
      row_products_block<C / 4>(row, x, depth, columns + c, left, dots + c);
    }
  }
}

template <int V, class T>
int64_t row_mix_vectors(const T* weights, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* out,
                        int64_t from) {
  constexpr int L = kLanes<T>;
  for (; from + V * L <= depth; from += V * L) {
    Vec<T> acc[V] = {};
    for (int64_t c = 0; c < count; ++c) {
      const T* column = x + columns[c] * depth + from;
      const Vec<T> weight = splat(weights[c]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        acc[v] += weight * load(column + v * L);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      store(out + from + v * L, load(out + from + v * L) + acc[v]);
  }
  return from;
}

// out[:] += sum_c weights[c] x[columns[c]][:]
template <class T>
void row_mix(const T* weights, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* out) {
  int64_t done = row_mix_vectors<kAccumulators>(weights, x, depth, columns, count, out, 0);
  done = row_mix_vectors<4>(weights, x, depth, columns, count, out, done);
  row_mix_vectors<1>(weights, x, depth, columns, count, out, done);
}

}  // namespace
}  // namespace hpk::HPK_ISA
