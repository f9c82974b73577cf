// Screening engines for search.h: fast products s'_ij that approximate the canonical dot product s_ij with a proven
// error.
//
// An engine S has Input (float, double), Group (what one lane of a packed panel holds), the register block MR x NR,
// groups(depth), and
//   pack<left>   packs a panel of rows and gives each row a norm n >= |x|, |x'| and an error e such that for all pairs
//                |s'_ij - s_ij| <= n_i e_j + e_i n_j    (plus what error_band adds); false if an element is not finite
//   micro        the MR x NR screened products of two panels
//
// With x' what the engine multiplies: <x, y> - <x', y'> = <x, y - y'> + <x - x', y'>, so by Cauchy-Schwarz e = |x - x'|
// plus half of the relative rounding errors of both sums times n.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/vector/tile.h"

namespace hpk::HPK_ISA {

constexpr int kChains = 32;

// The canonical <a, b>: element d goes to chain d mod 32, each chain is c = fma(a_d, b_d, c), and chains are added by
// halves. It is symmetric and the same for every vector width (only machines without fma round twice).
template <class T>
inline T canonical_dot(const T* a, const T* b, int64_t depth) {
  constexpr int L = kLanes<T>, V = kChains / L;
  Vec<T> chain[V] = {};
  int64_t d = 0;
  for (; d + kChains <= depth; d += kChains)
    for (int v = 0; v < V; ++v)
      chain[v] += load(a + d + v * L) * load(b + d + v * L);
  for (int v = 0; v < V && d < depth; ++v, d += L) {
    const int64_t count = std::min<int64_t>(L, depth - d);
    chain[v] += load_part(a + d, count) * load_part(b + d, count);
  }
  for (int half = V / 2; half; half /= 2)
    for (int v = 0; v < half; ++v)
      chain[v] += chain[v + half];
  return sum<T>(chain[0]);
}

// Norm and error of a row, or their maxima over a block of rows.
template <class T>
struct Bound {
  T norm, error;
};

// Exact to a few roundings for any finite x, without overflow or underflow; nan where x is not finite.
template <class T>
T careful_norm(const T* x, int64_t depth) {
  T scale = 0;
  bool finite = true;
  for (int64_t d = 0; d < depth; ++d) {
    scale = std::max(scale, std::fabs(x[d]));
    finite = finite && std::fabs(x[d]) <= std::numeric_limits<T>::max();
  }
  if (!finite) return std::numeric_limits<T>::quiet_NaN();
  if (scale == 0) return 0;
  T total = 0;
  for (int64_t d = 0; d < depth; ++d)
    total += (x[d] / scale) * (x[d] / scale);
  return scale * std::sqrt(total);
}

// An upper bound of |x|; nan where x is not finite.
template <class T>
T norm_bound(const T* x, int64_t depth) {
  constexpr T low = sizeof(T) == 4 ? T(1e-20) : T(1e-200), high = sizeof(T) == 4 ? T(1e30) : T(1e250);
  const T square = canonical_dot(x, x, depth);
  const T norm = square > low && square < high ? std::sqrt(square) : careful_norm(x, depth);
  return norm * (1 + static_cast<T>(depth + 16) * std::numeric_limits<T>::epsilon());
}

// Products in T itself: x' = x, only the roundings of two summation orders differ.
template <class T>
struct ScreenExact {
  using Input = T;
  using Group = T;
  static constexpr int MR = Engine<T>::MR, NR = Engine<T>::NR;

  static int64_t groups(int64_t depth) { return depth; }

  template <bool kLeft>
  static bool pack(const T* const* rows, int64_t depth, T* out, T*, int32_t*, Bound<T>* bounds) {
    constexpr int P = kLeft ? MR : NR;
    pack_panel<P>(rows, depth, out);
    bool finite = true;
    for (int r = 0; r < P && rows[r]; ++r) {
      const T norm = norm_bound(rows[r], depth);
      finite = finite && norm == norm;
      bounds[r] = {norm, norm * static_cast<T>(depth + 16) * std::numeric_limits<T>::epsilon()};
    }
    return finite;
  }

  __attribute__((noinline)) static void micro(int64_t groups, const T* a, const T* b, const T*, const T*,
                                              const int32_t*, T* out, int64_t ld) {
    Engine<T>::micro(groups, a, b, out, ld, false);
  }
};

}  // namespace hpk::HPK_ISA
