// The part of the sparse contrastive kernels that comes from the negatives outside P.
//
// Work comes in groups of up to eight rows with the same i mod R, which share one row of the negatives mask: a list of
// columns, with a byte per column that says for which of the rows it counts. A group owns its rows. The column side of
// the gradient is written by owners of column ranges, in a second phase, from coefficients that the first phase leaves
// in a bounded buffer. (That takes all rows as anchors; for a range of them see contrastive_negatives_range.h.)
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

// ---- gradient

// The coefficients G_ij / temperature of a group's rows.
template <class T>
class Coefficients {
 public:
  Coefficients(const ContrastiveArgs<T>& args, const RowFactors<T>* factors, const Group& group)
      : fixed_(fixed_shift(args)),
        scale_(static_cast<T>(1 / args.temperature)),
        denominator_(rows(factors, group, &RowFactors<T>::denominator)),
        lse_(rows(factors, group, &RowFactors<T>::lse)) {}

  // weights[c * kGroup + r] from dots as from products(), and a byte per column for the rows it counts for.
  void compute(const T* dots, int64_t count, const uint8_t* bytes, T* weights) const {
    using Lanes = GroupLanes<T>;
    const Vec<T> scale = splat(scale_);
    for (int64_t f = 0; f < count * kGroup; f += Lanes::kWidth)
      for (int i = 0; i < Lanes::kPieces; ++i) {
        const int64_t at = f + i * kLanes<T>;
        const Vec<T> p = exp<T>(load(dots + at) * scale - (fixed_ ? scale : lse_.piece[i]));
        store(weights + at, keep(group_mask<T>(bytes, at), p * denominator_.piece[i] * scale));
      }
  }

 private:
  static GroupLanes<T> rows(const RowFactors<T>* factors, const Group& group, T RowFactors<T>::* member) {
    T value[kGroup] = {};
    for (int r = 0; r < group.count; ++r)
      value[r] = factors[group.row[r]].*member;
    return GroupLanes<T>::repeat(value);
  }

  bool fixed_;
  T scale_;
  GroupLanes<T> denominator_, lse_;
};

// The rows a group writes; what belongs to no row goes to `spare`.
template <class T>
RowPointers<T> output_rows(T* base, const Group& group, int64_t depth, T* spare) {
  RowPointers<T> rows(base, group, depth);
  for (int r = group.count; r < kGroup; ++r)
    rows.row[r] = spare;
  return rows;
}

// One group of the negatives in the buffer that the two phases share.
struct NegativeTask {
  Group group;
  int64_t position, part;  // the row of the negatives; which eight of its rows
  int64_t first, count;    // its columns in the buffer
};

// Adds the part of the gradient that comes from the negatives to out (streams, rows, depth).
template <class T>
class NegativeGrad {
 public:
  NegativeGrad(const Problem<T>& problem, const RowFactors<T>* factors, T* out)
      : problem_(problem),
        args_(problem.args),
        factors_(factors),
        out_(out),
        tasks_(args_.masks.negative_rows * groups_per_position(problem)),
        workers_(worker_count(args_.threads, tasks_)),
        dots_(workers_ * kChunk * kGroup),
        bytes_(workers_ * byte_stride(args_)),
        spare_(workers_ * problem.depth),
        list_(tasks_) {
    std::fill(spare_.get(), spare_.get() + workers_ * problem.depth, T(0));
    const Scratch<int32_t> counts(args_.masks.negative_rows);
    count_bits(args_.masks.negatives, args_.masks.negative_rows, args_.masks.words, counts.get(), args_.threads);
    for (int64_t begin = 0; begin < tasks_;)
      begin = run(begin, counts.get());
  }

 private:
  static constexpr int64_t kBufferPairs = 1 << 21;  // coefficients kept between the two phases

  // Runs the tasks from `begin` on whose columns fit into the buffer; returns the first one left.
  int64_t run(int64_t begin, const int32_t* counts) {
    const int64_t per_position = groups_per_position(problem_);
    int64_t end = begin, columns = 0;
    for (; end < tasks_; ++end) {
      NegativeTask& task = list_[end];
      task.position = end / per_position;
      task.part = end % per_position;
      const int64_t room = counts[task.position] + counts[task.position] % 2;
      if (end > begin && (columns + room) * kGroup * args_.streams > kBufferPairs) break;
      task.first = columns;
      columns += room;
    }
    const Scratch<int32_t> index(columns);
    const Scratch<T> weights(columns * kGroup * args_.streams);
    parallel_for(args_.threads, end - begin, [&](int64_t n, int worker) {
      own_rows(list_[begin + n], worker, index.get(), weights.get(), columns);
    });
    const int64_t height = std::min(args_.rows, kRangeColumns), slices = (problem_.depth + kSlice - 1) / kSlice;
    const int64_t ranges = (args_.rows + height - 1) / height, blocks = args_.streams * slices * ranges;
    const Scratch<T> sums(worker_count(args_.threads, blocks) * height * kSlice);
    parallel_for(args_.threads, blocks, [&](int64_t block, int worker) {
      const int64_t s = block / (slices * ranges), slice = block / ranges % slices, low = block % ranges * height;
      own_columns(&list_[begin], end - begin, s, slice * kSlice, low, std::min(args_.rows, low + height), index.get(),
                  weights.get() + s * columns * kGroup, sums.get() + worker * height * kSlice);
    });
    return end;
  }

  // First phase: coefficients of a group, and the sum over its columns.
  void own_rows(NegativeTask& task, int worker, int32_t* index, T* weights, int64_t columns) {
    task.count = 0;
    task.group = active_rows(task);
    if (task.group.count == 0) return;
    int32_t* const own = index + task.first;
    uint8_t* bytes = bytes_.get() + worker * byte_stride(args_);
    task.count = list_negatives(args_, task.position, task.group, own, bytes);
    T* dots = dots_.get() + worker * kChunk * kGroup;
    for (int64_t s = 0; s < args_.streams; ++s) {
      const Coefficients<T> coefficients(args_, factors_ + s * args_.rows, task.group);
      const RowPointers<T> rows =
          output_rows(out_stream(s), task.group, problem_.depth, spare_.get() + worker * problem_.depth);
      T* const all_weights = weights + (s * columns + task.first) * kGroup;
      for (int64_t from = 0; from < task.count; from += kChunk) {
        const int64_t count = std::min(kChunk, task.count - from);
        T* part = all_weights + from * kGroup;
        group_products(problem_, s, task.group, own + from, count, dots);
        coefficients.compute(dots, count, bytes + from, part);
        with_row_count(task.group.count, [&](auto r) {
          mix_columns<r()>(part, problem_.stream(s), problem_.depth, own + from, count, rows.row);
        });
      }
    }
  }

  // Second phase: what the tasks' rows add to elements [from, from + kSlice) of the columns in [low, high). These sums
  // stay in the second-level cache while all tasks pass by.
  void own_columns(const NegativeTask* tasks, int64_t count, int64_t s, int64_t from, int64_t low, int64_t high,
                   const int32_t* index, const T* weights, T* sums) {
    const int64_t width = std::min(kSlice, problem_.depth - from);
    std::fill(sums, sums + (high - low) * width, T(0));
    for (int64_t n = 0; n < count; ++n) {
      const NegativeTask& task = tasks[n];
      const int32_t* const own = index + task.first;
      const int64_t begin = lower_bound(own, task.count, low),
                    end = begin + lower_bound(own + begin, task.count - begin, high);
      if (begin == end) continue;
      const RowPointers<const T> rows(problem_.stream(s) + from, task.group, problem_.depth);
      with_row_count(task.group.count, [&](auto r) {
        scatter_rows<r()>(weights + (task.first + begin) * kGroup, rows.row, width, own + begin, end - begin, low,
                          sums);
      });
    }
    for (int64_t j = low; j < high; ++j) {
      T* const out = out_stream(s) + j * problem_.depth + from;
      for (int64_t d = 0; d < width; ++d)
        out[d] += sums[(j - low) * width + d];
    }
  }

  // Rows with a gradient of their denominator in some stream; the others have no coefficients.
  Group active_rows(const NegativeTask& task) const {
    Group group{};
    int64_t skip = task.part * kGroup;
    for (int64_t image = 0; image < problem_.rows_per_position() && group.count < kGroup; ++image) {
      const int64_t row = image * args_.masks.negative_rows + task.position;
      bool active = false;
      for (int64_t s = 0; s < args_.streams; ++s)
        active |= factors_[s * args_.rows + row].denominator != 0;
      if (active && skip-- <= 0) group.row[group.count++] = row;
    }
    return group;
  }

  static int64_t lower_bound(const int32_t* sorted, int64_t count, int64_t value) {
    int64_t low = 0;
    while (count > 0) {
      const int64_t half = count / 2;
      if (sorted[low + half] < value) {
        low += half + 1;
        count -= half + 1;
      } else {
        count = half;
      }
    }
    return low;
  }

  T* out_stream(int64_t s) const { return out_ + s * args_.rows * problem_.depth; }

  static constexpr int64_t kSlice = 512 / sizeof(T);  // elements of a row, and columns, that a second-phase task owns
  static constexpr int64_t kRangeColumns = 1280;
  const Problem<T>& problem_;
  const ContrastiveArgs<T>& args_;
  const RowFactors<T>* factors_;
  T* out_;
  int64_t tasks_, workers_;
  Scratch<T> dots_;
  Scratch<uint8_t> bytes_;
  Scratch<T> spare_;
  Scratch<NegativeTask> list_;
};

}  // namespace
}  // namespace hpk::HPK_ISA
