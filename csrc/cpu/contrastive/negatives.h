// The part of the sparse contrastive kernels that comes from the negatives outside P.
//
// Work comes in groups of up to eight rows with the same i mod R, which share one row of the negatives mask: a list of
// columns, with a byte per column that says for which of the rows it counts. Statistics are here, the gradient is in
// negatives_grad.h.
#pragma once

#include "cpu/contrastive/problem.h"
#include "cpu/contrastive/rows.h"
#include "cpu/pair_bits/pair_bits.h"
#include "cpu/runtime/thread_pool.h"

namespace hpk::HPK_ISA {
namespace {

// ---- rows and columns of a group

struct Group {
  int count;
  int64_t row[kGroup];
};

template <class T>
struct RowPointers {
  T* row[kGroup];

  RowPointers(T* base, const Group& group, int64_t depth) {  // rows past the end repeat the last one
    for (int r = 0; r < kGroup; ++r)
      row[r] = base + group.row[std::min(r, group.count - 1)] * depth;
  }
};

constexpr int64_t kByteSlack = 2;  // group_mask reads a byte past an odd number of columns

template <class T>
int64_t groups_per_position(const Problem<T>& problem) {
  return (problem.rows_per_position() + kGroup - 1) / kGroup;
}

template <class T>
int64_t byte_stride(const ContrastiveArgs<T>& args) {
  return (args.rows + kByteSlack + 63) / 64 * 64;
}

// Lists the columns of one row of the negatives that enter the denominators of the group's rows through it: not P, not
// the rows themselves. bytes[c] has bit r set where column c counts for row r, and a zero at the end. Returns the
// number of columns.
template <class T>
int64_t list_negatives(const ContrastiveArgs<T>& args, int64_t position, const Group& group, int32_t* index,
                       uint8_t* bytes) {
  const ContrastiveMasks& masks = args.masks;
  int64_t count = 0;
  const uint32_t* shared = masks.negatives + position * masks.words;
  uint32_t row_words[kGroup] = {};
  for (int64_t w = 0; w < masks.words; ++w) {
    if (!shared[w]) continue;
    uint32_t left = 0;
    for (int r = 0; r < group.count; ++r) {
      const uint32_t positives = masks.positives[(group.row[r] - args.first) * masks.words + w];
      row_words[r] = without_diagonal(shared[w] & ~positives, group.row[r], w);
      left |= row_words[r];
    }
    for (; left; left &= left - 1, ++count) {
      const int k = __builtin_ctz(left);
      uint32_t byte = 0;
      for (int r = 0; r < kGroup; ++r)
        byte |= ((row_words[r] >> k) & 1) << r;
      index[count] = static_cast<int32_t>(32 * w + k);
      bytes[count] = static_cast<uint8_t>(byte);
    }
  }
  bytes[count] = 0;
  return count;
}

// The bits of lanes f .. f + kLanes - 1 of a table with kGroup lanes per column, given a byte per column.
template <class T>
inline LaneMask<T> group_mask(const uint8_t* bytes, int64_t f) {
  if constexpr (kLanes<T> == 2 * kGroup) {
    uint16_t two;
    std::memcpy(&two, bytes + f / kGroup, sizeof two);
    return expand<T>(two);
  } else {
    return expand<T>((static_cast<uint32_t>(bytes[f / kGroup]) >> (f % kGroup)) & ((1u << kLanes<T>)-1));
  }
}

// ---- statistics

// Eight rows' values, repeated to fill kPieces vectors that line up with the lanes of a group's table.
template <class T>
struct GroupLanes {
  static constexpr int kWidth = std::max(kGroup, kLanes<T>), kPieces = kWidth / kLanes<T>;
  Vec<T> piece[kPieces];

  explicit GroupLanes(T value = 0) {
    for (auto& p : piece)
      p = splat(value);
  }
  static GroupLanes repeat(const T (&value)[kGroup]) {
    GroupLanes lanes;
    T wide[kWidth];
    for (int l = 0; l < kWidth; ++l)
      wide[l] = value[l % kGroup];
    for (int p = 0; p < kPieces; ++p)
      lanes.piece[p] = load(wide + p * kLanes<T>);
    return lanes;
  }
  template <class Combine>
  void reduce(T (&value)[kGroup], Combine&& combine) const {
    T wide[kWidth];
    for (int p = 0; p < kPieces; ++p)
      store(wide + p * kLanes<T>, piece[p]);
    for (int r = 0; r < kGroup; ++r) {
      value[r] = wide[r];
      for (int l = r + kGroup; l < kWidth; l += kGroup)
        value[r] = combine(value[r], wide[l]);
    }
  }
};

template <class T>
struct GroupStats {
  T shift[kGroup], sum[kGroup] = {};

  explicit GroupStats(const ContrastiveArgs<T>& args) { std::fill(shift, shift + kGroup, first_shift(args)); }

  // Adds `count` columns: dots as from products(), and a byte per column for the rows it counts for.
  void add(const ContrastiveArgs<T>& args, const T* dots, int64_t count, const uint8_t* bytes) {
    using Lanes = GroupLanes<T>;
    const Vec<T> scale = splat(static_cast<T>(1 / args.temperature));
    const int64_t end = count * kGroup;
    if (!fixed_shift(args)) raise_shift(dots, end, scale, bytes);
    const Lanes minus = Lanes::repeat(shift);
    Lanes sums;
    for (int64_t f = 0; f < end; f += Lanes::kWidth)
      for (int i = 0; i < Lanes::kPieces; ++i) {
        const int64_t at = f + i * kLanes<T>;
        sums.piece[i] += keep(group_mask<T>(bytes, at), exp<T>(load(dots + at) * scale - minus.piece[i]));
      }
    T part[kGroup];
    sums.reduce(part, [](T a, T b) { return a + b; });
    for (int r = 0; r < kGroup; ++r)
      sum[r] += part[r];
  }

 private:
  void raise_shift(const T* dots, int64_t end, Vec<T> scale, const uint8_t* bytes) {
    using Lanes = GroupLanes<T>;
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    Lanes highest(kNone);
    for (int64_t f = 0; f < end; f += Lanes::kWidth)
      for (int i = 0; i < Lanes::kPieces; ++i) {
        const int64_t at = f + i * kLanes<T>;
        highest.piece[i] = max(highest.piece[i], group_mask<T>(bytes, at) ? load(dots + at) * scale : splat(kNone));
      }
    T top[kGroup];
    highest.reduce(top, [](T a, T b) { return std::max(a, b); });
    for (int r = 0; r < kGroup; ++r) {
      if (!(top[r] > shift[r])) continue;
      sum[r] *= exp_of(shift[r] - top[r]);
      shift[r] = top[r];
    }
  }
};

// dots[c * kGroup + r] = <x_row, x_column> of stream s, for the group's rows and `count` columns
template <class T>
void group_products(const Problem<T>& problem, int64_t s, const Group& group, const int32_t* columns, int64_t count,
                    T* dots) {
  const RowPointers<const T> rows(problem.stream(s), group, problem.depth);
  with_row_count(group.count,
                 [&](auto r) { products<r()>(rows.row, problem.stream(s), problem.depth, columns, count, dots); });
  // an odd number of columns leaves half a vector: it must hold numbers
  std::fill(dots + count * kGroup, dots + (count + count % 2) * kGroup, T(0));
}

// Sums over the negatives without P: shift and sum (streams, count) of every anchor.
template <class T>
void negative_stats(const Problem<T>& problem, T* shift, T* sum) {
  const ContrastiveArgs<T>& args = problem.args;
  const int64_t per_position = groups_per_position(problem), tasks = args.masks.negative_rows * per_position;
  const int64_t workers = worker_count(args.threads, tasks), stride = byte_stride(args);
  const Scratch<int32_t> indices(workers * stride);
  const Scratch<uint8_t> bytes_of(workers * stride);
  const Scratch<T> dots_of(workers * kChunk * kGroup);
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const int64_t position = task / per_position, period = args.masks.negative_rows;
    Group group{};
    for (int64_t row = first_at_position(args, position) + task % per_position * kGroup * period;
         group.count < kGroup && row < args.first + args.count; row += period)
      group.row[group.count++] = row;
    if (group.count == 0) return;
    int32_t* const index = indices.get() + worker * stride;
    uint8_t* const bytes = bytes_of.get() + worker * stride;
    T* const dots = dots_of.get() + worker * kChunk * kGroup;
    const int64_t count = list_negatives(args, position, group, index, bytes);
    for (int64_t s = 0; s < args.streams; ++s) {
      GroupStats<T> stats(args);
      for (int64_t from = 0; from < count; from += kChunk) {
        const int64_t columns = std::min(kChunk, count - from);
        group_products(problem, s, group, index + from, columns, dots);
        stats.add(args, dots, columns, bytes + from);
      }
      for (int r = 0; r < group.count; ++r) {
        const int64_t at = s * args.count + group.row[r] - args.first;
        shift[at] = stats.shift[r];
        sum[at] = stats.sum[r];
      }
    }
  });
}

}  // namespace
}  // namespace hpk::HPK_ISA
