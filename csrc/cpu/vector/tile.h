// Register-blocked matrix products, for kernels that reduce a tile of s_ij = <a_i, b_j> while it is in cache.
//
//     constexpr int64_t kRows = 192, kCols = 192;                 // any sizes; multiples of MR and NR waste least
//     using E = Engine<float>;
//     Scratch<float> b(E::b_size(kCols, depth)), s(E::round_rows(kRows) * E::round_cols(kCols));
//     pack_rows<E::NR>(keys + j0 * depth, depth, nullptr, cols, depth, b.get());      // rows j0 .. of a row-major
//     matrix multiply<E>(rows, cols, depth, rows_of(queries + i0 * depth, depth), b.get(), s.get(), ld);
//     // s[r * ld + c] = <queries_{i0 + r}, keys_{j0 + c}>
//
// The left factor is read where it lies (`Left`): its elements are broadcast one by one, so a packed copy would serve
// them no faster. For C += G X with row-major X (k x columns), pack X with pack_columns<NR> and call multiply with
// accumulate = true and rows_of(G), or columns_of(G) for its transpose: that is the gradient panel.
//
// multiply writes whole blocks of MR rows and whole vectors of columns: C needs round_rows(rows) rows and
// ld >= round_cols(cols). What it writes past the end means nothing. Every element is one chain c = fma(a_d, b_d, c),
// d ascending, so its value does not depend on where in which tile it is computed, and <x_i, x_j> == <x_j, x_i> bit
// for bit.
#pragma once

#include "cpu/vector/simd.h"

namespace hpk::HPK_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

template <class T>
struct Engine {
  using Scalar = T;
  static constexpr int MR = kTileRows, NV = kTileVectors, NR = NV * kLanes<T>;
  static constexpr int64_t kAhead = 32;  // columns of the factors between a product and what is fetched for later ones

  static int64_t round_rows(int64_t rows) { return (rows + MR - 1) / MR * MR; }
  static int64_t round_cols(int64_t cols) { return (cols + NR - 1) / NR * NR; }
  static int64_t b_size(int64_t cols, int64_t depth) { return round_cols(cols) * depth; }

  // c[MR][NR] = (accumulate ? c : 0) + a^T b;  a is [depth][MR], b is [depth][NR]
  static inline void micro(int64_t depth, const T* a, const T* b, T* c, int64_t ld, bool accumulate) {
    const T* rows[MR];
    for (int r = 0; r < MR; ++r)
      rows[r] = a + r;
    block<NV>(depth, rows, std::integral_constant<int64_t, MR>(), b, c, ld, accumulate);
  }

  // The same for the first V vectors of c, with element (r, d) of the left factor at rows[r][d * step]. The product is
  // summed first and added to c at the end, so that a long sum made of several calls is a sum of short ones.
  template <int V, class Step>
  static inline void block(int64_t depth, const T* const* rows, Step step, const T* b, T* c, int64_t ld,
                           bool accumulate) {
    Vec<T> acc[MR][V];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        acc[r][v] = Vec<T>{};
    for (int64_t d = 0; d < depth; ++d, b += NR) {
      Vec<T> col[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        col[v] = load(b + v * kLanes<T>);
        __builtin_prefetch(b + kAhead * NR + v * kLanes<T>);
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec<T> row = splat(rows[r][d * step]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
          acc[r][v] += row * col[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        T* out = c + r * ld + v * kLanes<T>;
        store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
      }
  }
};

// One panel [depth][P] of P rows; a null row is zero. Squares of 4 x 4 floats are transposed in registers, 16 elements
// of a row (a cache line) at a time.
template <int P, class T>
void pack_panel(const T* const* rows, int64_t depth, T* out) {
  constexpr int64_t kChunk = 16;
  for (int64_t begin = 0; begin < depth; begin += kChunk) {
    const int64_t end = begin + kChunk < depth ? begin + kChunk : depth;
    int r = 0;
#if defined(__x86_64__)
    if constexpr (std::is_same<T, float>::value) {
      for (; r + 4 <= P && end == begin + kChunk && rows[r + 3]; r += 4) {
        for (int64_t d = begin; d < end; d += 4) {
          __m128 x0 = _mm_loadu_ps(rows[r] + d), x1 = _mm_loadu_ps(rows[r + 1] + d);
          __m128 x2 = _mm_loadu_ps(rows[r + 2] + d), x3 = _mm_loadu_ps(rows[r + 3] + d);
          _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
          float* square = out + d * P + r;
          _mm_storeu_ps(square, x0);
          _mm_storeu_ps(square + P, x1);
          _mm_storeu_ps(square + 2 * P, x2);
          _mm_storeu_ps(square + 3 * P, x3);
        }
      }
    }
#endif
    for (; r < P; ++r)
      for (int64_t d = begin; d < end; ++d)
        out[d * P + r] = rows[r] ? rows[r][d] : T(0);
  }
}

// Panels of P rows of a row-major matrix, each [depth][P]; out needs ceil(rows / P) * P * depth elements. index (or
// nullptr) picks the rows. Rows past the end are zero.
template <int P, class T>
void pack_rows(const T* x, int64_t stride, const int64_t* index, int64_t rows, int64_t depth, T* out) {
  for (int64_t first = 0; first < rows; first += P, out += P * depth) {
    const T* source[P];
    for (int r = 0; r < P; ++r)
      source[r] = first + r < rows ? x + (index ? index[first + r] : first + r) * stride : nullptr;
    pack_panel<P>(source, depth, out);
  }
}

// Panels of P columns of a row-major matrix with `depth` rows, each [depth][P]; index (or nullptr) picks the rows.
// Columns past the end are zero.
template <int P, class T>
void pack_columns(const T* x, int64_t stride, const int64_t* index, int64_t depth, int64_t columns, T* out) {
  for (int64_t first = 0; first < columns; first += P) {
    const int64_t count = columns - first < P ? columns - first : P;
    for (int64_t d = 0; d < depth; ++d, out += P) {
      const T* source = x + (index ? index[d] : d) * stride + first;
      if (count == P) {
        std::memcpy(out, source, sizeof(T) * P);
      } else {
        for (int64_t c = 0; c < P; ++c)
          out[c] = c < count ? source[c] : T(0);
      }
    }
  }
}

// The left factor of a product: element (r, d) is data[r * row + d * step].
template <class T>
struct Left {
  const T* data;
  int64_t row, step;
};

template <class T>
Left<T> rows_of(const T* matrix, int64_t stride) {
  return {matrix, stride, 1};
}
template <class T>
Left<T> columns_of(const T* matrix, int64_t stride) {
  return {matrix, 1, stride};
}

// The columns of one panel of b: V vectors of them, or `vectors` < V where the panel is the last.
template <class E, int V, class Step, class T = typename E::Scalar>
void multiply_panel(int64_t vectors, int64_t rows, int64_t depth, Left<T> a, Step step, const T* b, T* c, int64_t ld,
                    bool accumulate) {
  if constexpr (V > 1)
    if (vectors < V) return multiply_panel<E, V - 1>(vectors, rows, depth, a, step, b, c, ld, accumulate);
  for (int64_t i = 0; i < rows; i += E::MR) {
    const T* row[E::MR];  // past the end the last one again
    if (accumulate)       // C may lie far away: fetch what the block adds to while it multiplies
      for (int r = 0; r < E::MR; ++r)
        for (int v = 0; v < V; ++v)
          __builtin_prefetch(c + (i + r) * ld + v * kLanes<T>, 1);
    for (int64_t r = 0; r < E::MR; ++r)
      row[r] = a.data + (i + r < rows ? i + r : rows - 1) * a.row;
    E::template block<V>(depth, row, step, b, c + i * ld, ld, accumulate);
  }
}

// C (rows x cols, leading dimension ld) = or += the product of a and packed panels b.
template <class E, class T = typename E::Scalar>
void multiply(int64_t rows, int64_t cols, int64_t depth, Left<T> a, const T* b, T* c, int64_t ld,
              bool accumulate = false) {
  for (int64_t j = 0; j < cols; j += E::NR) {
    const int64_t vectors = (cols - j + kLanes<T> - 1) / kLanes<T>;
    if (a.step == 1) {
      multiply_panel<E, E::NV>(vectors, rows, depth, a, std::integral_constant<int64_t, 1>(), b + j * depth, c + j, ld,
                               accumulate);
    } else {
      multiply_panel<E, E::NV>(vectors, rows, depth, a, a.step, b + j * depth, c + j, ld, accumulate);
    }
  }
}

}  // namespace hpk::HPK_ISA
