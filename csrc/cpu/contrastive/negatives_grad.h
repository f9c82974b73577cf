// The gradient that comes from the negatives outside P, for all rows as anchors.
//
// A group owns its rows. The column side is written by owners of column ranges, in a second phase, from coefficients
// that the first phase leaves in a bounded buffer. (For a range of the anchors see negatives_range.h.)
#pragma once

#include "cpu/contrastive/negatives.h"

namespace hpk::HPK_ISA {
namespace {

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
