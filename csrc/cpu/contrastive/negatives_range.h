// The gradient that comes from the negatives outside P, for a range of the anchors.
//
// The range owns its output, so both sides of a pair end in it: sum_j G_ij x_j over the columns of an anchor, and
// sum_i G_ij x_i over all rows i whose negatives name it. The second cannot reuse the coefficients of the first, as it
// does where all rows are anchors: these are other pairs. It is computed by owners of blocks of anchors, past which all
// groups of rows go in a fixed order.
#pragma once

#include "cpu/contrastive/negatives_grad.h"

namespace hpk::HPK_ISA {
namespace {

// Adds the part of the gradient that comes from the negatives to out (streams, count, depth).
template <class T>
class RangeNegativeGrad {
 public:
  RangeNegativeGrad(const Problem<T>& problem, const RowFactors<T>* factors, T* out)
      : problem_(problem), args_(problem.args), factors_(factors), out_(out) {
    own_rows();
    own_columns();
  }

 private:
  static constexpr int64_t kBlock = 512;  // anchors of a task of the column side

  // Room for one group's columns. One per worker.
  struct Lists {
    int32_t* index;
    uint8_t* bytes;
    T *dots, *weights;
  };
  class ListScratch {
   public:
    ListScratch(int64_t workers, int64_t columns)
        : stride_((columns + kByteSlack + 63) / 64 * 64),
          index_(workers * stride_),
          bytes_(workers * stride_),
          numbers_(2 * workers * kChunk * kGroup) {}
    Lists of(int worker) const {
      T* const numbers = numbers_.get() + 2 * worker * kChunk * kGroup;
      return {index_.get() + worker * stride_, bytes_.get() + worker * stride_, numbers, numbers + kChunk * kGroup};
    }

   private:
    int64_t stride_;
    Scratch<int32_t> index_;
    Scratch<uint8_t> bytes_;
    Scratch<T> numbers_;
  };

  // Calls f(group) for the rows in [first, end) with i mod negative_rows = the first one's, eight at a time. Rows
  // without a gradient of their denominator in any stream are left out.
  template <class F>
  void for_each_group(int64_t first, int64_t end, F&& f) const {
    Group group{};
    for (int64_t row = first; row < end; row += args_.masks.negative_rows) {
      bool active = false;
      for (int64_t s = 0; s < args_.streams; ++s)
        active |= factors_[s * args_.rows + row].denominator != 0;
      if (active) group.row[group.count++] = row;
      if (group.count < kGroup) continue;
      f(group);
      group.count = 0;
    }
    if (group.count) f(group);
  }

  // Calls f(columns, their number, weights), kChunk columns at a time, with weights[c * kGroup + r] = G / temperature
  // of the group's row r and column c.
  template <class F>
  void for_each_chunk(int64_t s, const Group& group, const Lists& lists, int64_t count, F&& f) const {
    const Coefficients<T> coefficients(args_, factors_ + s * args_.rows, group);
    for (int64_t from = 0; from < count; from += kChunk) {
      const int64_t columns = std::min(kChunk, count - from);
      group_products(problem_, s, group, lists.index + from, columns, lists.dots);
      coefficients.compute(lists.dots, columns, lists.bytes + from, lists.weights);
      f(lists.index + from, columns, lists.weights);
    }
  }

  // out_i += sum_j G_ij x_j
  void own_rows() {
    const int64_t positions = args_.masks.negative_rows, workers = worker_count(args_.threads, positions);
    const ListScratch scratch(workers, args_.rows);
    const Scratch<T> spare(workers * problem_.depth);
    std::fill(spare.get(), spare.get() + workers * problem_.depth, T(0));
    parallel_for(args_.threads, positions, [&](int64_t position, int worker) {
      const Lists lists = scratch.of(worker);
      for_each_group(first_at_position(args_, position), args_.first + args_.count, [&](const Group& group) {
        const int64_t count = list_negatives(args_, position, group, lists.index, lists.bytes);
        Group anchors = group;
        for (int r = 0; r < group.count; ++r)
          anchors.row[r] -= args_.first;
        for (int64_t s = 0; s < args_.streams; ++s) {
          const RowPointers<T> rows =
              output_rows(out_stream(s), anchors, problem_.depth, spare.get() + worker * problem_.depth);
          for_each_chunk(s, group, lists, count, [&](const int32_t* index, int64_t columns, const T* weights) {
            with_row_count(group.count, [&](auto r) {
              mix_columns<r()>(weights, problem_.stream(s), problem_.depth, index, columns, rows.row);
            });
          });
        }
      });
    });
  }

  // out_j += sum_i G_ij x_i
  void own_columns() {
    const int64_t blocks = (args_.count + kBlock - 1) / kBlock, tasks = args_.streams * blocks;
    const int64_t workers = worker_count(args_.threads, tasks), depth = problem_.depth;
    const ListScratch scratch(workers, kBlock);
    const Scratch<T> all_sums(workers * kBlock * depth);
    parallel_for(args_.threads, tasks, [&](int64_t task, int worker) {
      const int64_t s = task / blocks, begin = task % blocks * kBlock, size = std::min(kBlock, args_.count - begin);
      const int64_t low = args_.first + begin;
      const Lists lists = scratch.of(worker);
      T *const sums = all_sums.get() + worker * kBlock * depth, *const out = out_stream(s) + begin * depth;
      std::fill(sums, sums + size * depth, T(0));
      int64_t pending = 0;  // columns added to the sums
      const auto flush = [&] {
        for (int64_t d = 0; d < size * depth; ++d) {
          out[d] += sums[d];
          sums[d] = 0;
        }
        pending = 0;
      };
      for (int64_t position = 0; position < args_.masks.negative_rows; ++position)
        for_each_group(position, args_.rows, [&](const Group& group) {
          const int64_t count = list_anchors(position, group, low, low + size, lists);
          if (count == 0) return;
          const RowPointers<const T> rows(problem_.stream(s), group, depth);
          for_each_chunk(s, group, lists, count, [&](const int32_t* index, int64_t columns, const T* weights) {
            with_row_count(group.count,
                           [&](auto r) { scatter_rows<r()>(weights, rows.row, depth, index, columns, low, sums); });
          });
          pending += count;
          if (pending >= kChunk * size) flush();  // a long sum is a sum of short ones
        });
      flush();
    });
  }

  // As list_negatives: the columns in [low, high), which are anchors, so that the transposed masks tell P.
  int64_t list_anchors(int64_t position, const Group& group, int64_t low, int64_t high, const Lists& lists) const {
    const ContrastiveMasks& masks = args_.masks;
    const uint32_t* shared = masks.negatives + position * masks.words;
    int64_t count = 0;
    for (int64_t w = low >> 5; w << 5 < high; ++w)
      for (uint32_t left = shared[w]; left; left &= left - 1) {
        const int64_t j = 32 * w + __builtin_ctz(left);
        if (j < low || j >= high) continue;
        const uint32_t* positives_t = masks.positives_t + (j - args_.first) * masks.words;
        uint32_t byte = 0;
        for (int r = 0; r < group.count; ++r) {
          const int64_t i = group.row[r];
          byte |= (i != j && !((positives_t[i >> 5] >> (i & 31)) & 1)) << r;
        }
        lists.index[count] = static_cast<int32_t>(j);
        lists.bytes[count] = static_cast<uint8_t>(byte);
        count += byte != 0;
      }
    lists.bytes[count] = 0;
    return count;
  }

  T* out_stream(int64_t s) const { return out_ + s * args_.count * problem_.depth; }

  const Problem<T>& problem_;
  const ContrastiveArgs<T>& args_;
  const RowFactors<T>* factors_;
  T* out_;
};

}  // namespace
}  // namespace hpk::HPK_ISA
