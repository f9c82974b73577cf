// What the parts of the sparse contrastive kernels share: the problem with padded rows, and how sums are combined.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/contrastive/contrastive.h"
#include "cpu/contrastive/lanes.h"
#include "cpu/vector/simd.h"

namespace hpk::HPK_ISA {
namespace {

// Rows padded to whole vectors.
template <class T>
struct Problem {
  const ContrastiveArgs<T>& args;
  int64_t depth;
  Scratch<T> padded;
  const T* x;

  explicit Problem(const ContrastiveArgs<T>& a)
      : args(a),
        depth((a.depth + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        padded(depth == a.depth ? 0 : a.streams * a.rows * depth),
        x(depth == a.depth ? a.x : padded.get()) {
    if (depth == a.depth) return;
    for (int64_t i = 0; i < a.streams * a.rows; ++i) {
      std::copy(a.x + i * a.depth, a.x + (i + 1) * a.depth, padded.get() + i * depth);
      std::fill(padded.get() + i * depth + a.depth, padded.get() + (i + 1) * depth, T(0));
    }
  }

  const T* stream(int64_t s) const { return x + s * args.rows * depth; }
  // The most anchors that share a row of the negatives.
  int64_t rows_per_position() const { return (args.count + args.masks.negative_rows - 1) / args.masks.negative_rows; }
};

// The first anchor that uses row `position` of the negatives; every negative_rows-th after it does, too.
template <class T>
inline int64_t first_at_position(const ContrastiveArgs<T>& args, int64_t position) {
  const int64_t period = args.masks.negative_rows;
  return args.first + (position + period - args.first % period) % period;
}

inline int64_t worker_count(int threads, int64_t tasks) {
  return std::max<int64_t>(1, std::min<int64_t>(threads, tasks));
}

inline uint32_t without_diagonal(uint32_t word, int64_t row, int64_t w) {
  return row >> 5 == w ? word & ~(1u << (row & 31)) : word;
}

// The shift to start from: the constant one, or none yet.
template <class T>
inline T first_shift(const ContrastiveArgs<T>& args) {
  return fixed_shift(args) ? static_cast<T>(1 / args.temperature) : -std::numeric_limits<T>::infinity();
}

// log(sum exp(shift) + other_sum exp(other_shift)), 0 if both sums are
template <class T>
inline T log_of_two_sums(T shift, T sum, T other_shift, T other_sum) {
  if (sum == 0 && other_sum == 0) return T(0);
  const T top = sum == 0 ? other_shift : other_sum == 0 ? shift : std::max(shift, other_shift);
  const T total =
      (sum == 0 ? T(0) : sum * exp_of(shift - top)) + (other_sum == 0 ? T(0) : other_sum * exp_of(other_shift - top));
  return static_cast<T>(static_cast<double>(top) + std::log(static_cast<double>(total)));
}

}  // namespace
}  // namespace hpk::HPK_ISA
