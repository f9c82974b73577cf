// What the search algorithms share, for any screening engine S (screen_*.h): approximate products with a proven error
// band decide most pairs, and the canonical dot product decides the rest. Results never depend on S, the tile shapes or
// the thread count.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/runtime/thread_pool.h"
#include "cpu/similarity_search/screen.h"
#include "cpu/similarity_search/similarity_search.h"
#include "shared/bits.h"

namespace hpk::HPK_ISA {

constexpr int64_t kBlock = 192;    // rows and columns of a tile: a multiple of MR and NR of every engine and of 32
constexpr int64_t kTaskRows = 96;  // rows of a task of max and topk

// |screened - canonical| for a row and any column of a block; infinite where products might overflow.
template <class T>
inline T error_band(Bound<T> row, Bound<T> block) {
  using Limits = std::numeric_limits<T>;
  const T size = row.norm * block.norm;
  if (!(size < Limits::max() / 256)) return Limits::infinity();
  constexpr T slack = 1 + 64 * Limits::epsilon(),
              tiny = Limits::min() * 65536;  // rounding here; products flushed to zero
  return (row.norm * block.error + row.error * block.norm) * slack + size * 4 * Limits::epsilon() + tiny;
}

// All rows of one operand, packed for screening.
template <class S, bool kLeft>
class Panels {
 public:
  using T = typename S::Input;
  using Group = typename S::Group;
  static constexpr int P = kLeft ? S::MR : S::NR;

  Panels(const Rows<T>& rows, int threads)
      : groups_(S::groups(rows.depth)),
        data_(round(rows.count) * groups_),
        scale_(round(rows.count)),
        offset_(round(rows.count)),
        row_(round(rows.count)),
        block_((rows.count + kBlock - 1) / kBlock) {
    std::atomic<bool> finite{true};
    parallel_for(threads, (rows.count + kBlock - 1) / kBlock, [&](int64_t task, int) {
      const int64_t begin = task * kBlock, end = std::min(rows.count, begin + kBlock);
      Bound<T> largest{0, 0};
      for (int64_t i = begin; i < end; i += P) {
        const T* source[P];
        for (int r = 0; r < P; ++r)
          source[r] = i + r < end ? rows.row(i + r) : nullptr;
        if (!S::template pack<kLeft>(source, rows.depth, data_.get() + i * groups_, &scale_[i], &offset_[i], &row_[i]))
          finite = false;
        for (int64_t r = i; r < std::min(end, i + P); ++r) {
          largest.norm = std::max(largest.norm, row_[r].norm);
          largest.error = std::max(largest.error, row_[r].error);
        }
      }
      block_[task] = largest;
    });
    if (!finite) throw std::invalid_argument(std::string(rows.name) + ": expected finite numbers, got NaN or infinity");
  }

  int64_t groups() const { return groups_; }
  const Group* panel(int64_t first_row) const { return data_.get() + first_row * groups_; }
  const T* scale(int64_t first_row) const { return scale_.get() + first_row; }
  const int32_t* offset(int64_t first_row) const { return offset_.get() + first_row; }
  Bound<T> row(int64_t i) const { return row_[i]; }
  Bound<T> block(int64_t first_row) const { return block_[first_row / kBlock]; }

 private:
  static int64_t round(int64_t count) { return (count + P - 1) / P * P; }

  int64_t groups_;
  Scratch<Group> data_;
  Scratch<T> scale_;
  Scratch<int32_t> offset_;
  Scratch<Bound<T>> row_, block_;
};

// Screened products of MR rows from i with up to kBlock columns from j, both multiples of the panel sizes; rows of the
// strip are kBlock apart.
template <class S>
struct Strip {
  static constexpr int64_t kSize =
      S::MR * kBlock + 64 / sizeof(typename S::Input);  // a vector load may pass the last column

  static void fill(const Panels<S, true>& a, int64_t i, const Panels<S, false>& b, int64_t j, int64_t cols,
                   typename S::Input* out) {
    for (int64_t c = 0; c < cols; c += S::NR) {
      S::micro(a.groups(), a.panel(i), b.panel(j + c), a.scale(i), b.scale(j + c), b.offset(j + c), out + c, kBlock);
    }
  }
};

// The largest of count <= kBlock numbers; three running maxima, as one would wait for itself.
template <class T>
inline T largest_of(const T* s, int64_t count) {
  constexpr int L = kLanes<T>;
  const Vec<T> lowest = splat(-std::numeric_limits<T>::infinity());
  Vec<T> m[3] = {lowest, lowest, lowest};
  int64_t c = 0;
  for (; c + 3 * L <= count; c += 3 * L)
    for (int v = 0; v < 3; ++v)
      m[v] = max(m[v], load(s + c + v * L));
  T value = largest<T>(max(max(m[0], m[1]), m[2]));
  for (; c < count; ++c)
    value = std::max(value, s[c]);
  return value;
}

// Calls f(c, s[c]) for every c in [begin, count) for which s[c] < bar is false.
template <class T, class F>
inline void for_each_candidate(const T* s, int64_t begin, int64_t count, T bar, F&& f) {
  constexpr int L = kLanes<T>;
  for (int64_t c = begin; c < count; c += L) {
    const int64_t lanes = std::min<int64_t>(L, count - c);
    uint32_t bits = ~bits_greater(splat(bar), load(s + c)) & ((1u << lanes) - 1);
    for (; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      f(c + lane, s[c + lane]);
    }
  }
}

// Rows to be verified lie far apart: asking for one this many dot products ahead hides the way to the outer caches.
constexpr int64_t kAhead = 6;

template <class T>
inline void prefetch_row(const T* x, int64_t depth) {
  for (int64_t d = 0; d < depth; d += 64 / sizeof(T))
    __builtin_prefetch(x + d);
}

}  // namespace hpk::HPK_ISA
