// The part of the sparse contrastive kernels that comes from the pairs of P and Q: row by row, pair by pair.
//
// A task takes kTaskRows rows through one block of columns after another: neighbouring patches have much the same
// positives, so their vectors are still in the second-level cache when the next row needs them.
#pragma once

#include "cpu/contrastive/problem.h"
#include "cpu/contrastive/rows.h"
#include "cpu/runtime/thread_pool.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int64_t kTaskRows = 112;
constexpr int64_t kBlockWords = 64;  // words of bits, 32 columns each, per block

// Why a pair (i, j) is listed.
enum PairFlag { kInP = 1, kInQ = 2, kInTransposedP = 4, kInTransposedQ = 8 };

// The pairs of a task's rows within one block of columns, row after row, and room for the numbers of one row's pairs.
// Each row's flags end with zeros for a vector. One per worker.
template <class T>
struct PairLists {
  int64_t start[kTaskRows + 1];  // of a row's pairs; its number of pairs is in `count`
  int64_t count[kTaskRows];
  int32_t* index;
  IntegerOf<T>* flags;
  T* values;
};

template <class T>
class PairScratch {
 public:
  explicit PairScratch(int64_t workers)
      : index_(workers * kPairs), flags_(workers * kPairs), values_(workers * kRowPairs) {}
  PairLists<T> of(int worker) const {
    PairLists<T> lists;
    lists.index = index_.get() + worker * kPairs;
    lists.flags = flags_.get() + worker * kPairs;
    lists.values = values_.get() + worker * kRowPairs;
    return lists;
  }

 private:
  static constexpr int64_t kRowPairs = kBlockWords * 32 + kRowSlack, kPairs = kTaskRows * kRowPairs;
  Scratch<int32_t> index_;
  Scratch<IntegerOf<T>> flags_;
  Scratch<T> values_;
};

// Which masks the pairs are listed from: Q may be left out, and the transposes where they equal the masks.
struct Listed {
  bool extra, transposed;
};

// Lists the pairs of the n-th anchor in words [begin, end) from index `count` on; returns the new count. W words are
// tested at a time.
template <class T>
int64_t list_row(const ContrastiveArgs<T>& args, Listed listed, int64_t anchor, int64_t begin, int64_t end,
                 const PairLists<T>& lists, int64_t count) {
  constexpr int W = 4;  // a row is a multiple of four words
  const ContrastiveMasks& masks = args.masks;
  const int64_t row = anchor * masks.words;
  const uint32_t none[W] = {};
  for (int64_t w0 = begin; w0 < end; w0 += W) {
    const uint32_t *p = masks.positives + row + w0, *q = listed.extra ? masks.extra + row + w0 : none;
    const uint32_t* p_t = listed.transposed ? masks.positives_t + row + w0 : p;
    const uint32_t* q_t = listed.transposed && listed.extra ? masks.extra_t + row + w0 : q;
    uint32_t any[W], together = 0;
    for (int k = 0; k < W; ++k)
      together |= any[k] = p[k] | q[k] | p_t[k] | q_t[k];
    if (!together) continue;
    for (int64_t w = w0; w < w0 + W; ++w)
      for (uint32_t left = without_diagonal(any[w - w0], args.first + anchor, w); left; left &= left - 1, ++count) {
        const int k = __builtin_ctz(left);
        const int64_t n = w - w0;
        lists.index[count] = static_cast<int32_t>(32 * w + k);
        lists.flags[count] = ((p[n] >> k) & 1) * kInP | ((q[n] >> k) & 1) * kInQ |
                             ((p_t[n] >> k) & 1) * kInTransposedP | ((q_t[n] >> k) & 1) * kInTransposedQ;
      }
  }
  return count;
}

// Runs f(stream, anchor, place of its pairs in the lists, their number) for the anchors of a task, which are counted
// from the first one. Blocks of columns come in ascending order; within a block all anchors of one stream come before
// the next stream.
template <class T, class F>
void for_each_row_block(const ContrastiveArgs<T>& args, int64_t task, Listed listed, PairLists<T> lists, F&& f) {
  const int64_t first = task * kTaskRows, rows = std::min(kTaskRows, args.count - first);
  for (int64_t w = 0; w < args.masks.words; w += kBlockWords) {
    int64_t total = 0;
    for (int64_t r = 0; r < rows; ++r) {
      lists.start[r] = total;
      total = list_row(args, listed, first + r, w, std::min(args.masks.words, w + kBlockWords), lists, total);
      lists.count[r] = total - lists.start[r];
      std::fill(lists.flags + total, lists.flags + total + kRowSlack, 0);
      total += kRowSlack;
    }
    for (int64_t s = 0; s < args.streams; ++s)
      for (int64_t r = 0; r < rows; ++r)
        if (lists.count[r]) f(s, first + r, lists.start[r], lists.count[r]);
  }
}

template <class T>
inline LaneMask<T> flagged(const IntegerOf<T>* flags, int flag) {
  return (load(flags) & splat(static_cast<IntegerOf<T>>(flag))) != Vec<IntegerOf<T>>{};
}

// ---- statistics

template <class T>
struct RowStats {
  T shift, sum, pos, ext;

  // Adds pairs by their dot products.
  void add(const ContrastiveArgs<T>& args, const T* dots, const IntegerOf<T>* flags, int64_t count) {
    const Vec<T> scale = splat(static_cast<T>(1 / args.temperature));
    if (!fixed_shift(args)) raise_shift(dots, flags, count, scale);
    const Vec<T> minus = splat(shift);
    Vec<T> sums{}, positives{}, extras{};
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      const Vec<T> logit = load(dots + c) * scale;
      const LaneMask<T> p = flagged<T>(flags + c, kInP);
      sums += keep(p, exp<T>(logit - minus));
      positives += keep(p, logit);
      extras += keep(flagged<T>(flags + c, kInQ), logit);
    }
    sum += hpk::HPK_ISA::sum<T>(sums);
    pos += hpk::HPK_ISA::sum<T>(positives);
    ext += hpk::HPK_ISA::sum<T>(extras);
  }

 private:
  void raise_shift(const T* dots, const IntegerOf<T>* flags, int64_t count, Vec<T> scale) {
    const Vec<T> none = splat(-std::numeric_limits<T>::infinity());
    Vec<T> highest = none;
    for (int64_t c = 0; c < count; c += kLanes<T>)
      highest = max(highest, flagged<T>(flags + c, kInP) ? load(dots + c) * scale : none);
    const T top = largest<T>(highest);
    if (!(top > shift)) return;
    sum *= exp_of(shift - top);
    shift = top;
  }
};

// Adds the positives to the negatives' sums (null without negatives), and writes all three statistics.
template <class T>
void positive_stats(const Problem<T>& problem, const T* shift, const T* sum, const ContrastiveStats<T>& out) {
  const ContrastiveArgs<T>& args = problem.args;
  const int64_t tasks = (args.count + kTaskRows - 1) / kTaskRows;
  const int64_t workers = worker_count(args.threads, tasks), all_rows = args.streams * kTaskRows;
  const PairScratch<T> scratch(workers);
  const Scratch<RowStats<T>> all_stats(workers * all_rows);
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const int64_t first = task * kTaskRows, rows = std::min(kTaskRows, args.count - first);
    const PairLists<T> lists = scratch.of(worker);
    RowStats<T>* const stats = all_stats.get() + worker * all_rows;
    std::fill(stats, stats + all_rows, RowStats<T>{first_shift(args), 0, 0, 0});
    for_each_row_block(args, task, {args.masks.extra != nullptr, false}, lists,
                       [&](int64_t s, int64_t anchor, int64_t at, int64_t count) {
                         const T *x = problem.stream(s), *row = x + (args.first + anchor) * problem.depth;
                         row_products(row, x, problem.depth, lists.index + at, count, lists.values);
                         stats[s * kTaskRows + anchor - first].add(args, lists.values, lists.flags + at, count);
                       });
    for (int64_t s = 0; s < args.streams; ++s)
      for (int64_t r = 0; r < rows; ++r) {
        const RowStats<T>& row = stats[s * kTaskRows + r];
        const int64_t i = s * args.count + first + r;
        out.lse[i] = log_of_two_sums(row.shift, row.sum, shift ? shift[i] : T(0), sum ? sum[i] : T(0));
        out.pos[i] = row.pos;
        out.ext[i] = row.ext;
      }
  });
}

// ---- gradient

// One of the columns' factors for a vector of pairs.
template <class T>
inline Vec<T> of_columns(const RowFactors<T>* factors, T RowFactors<T>::* member, const int32_t* index, int64_t left) {
  T lanes[kLanes<T>] = {};
  for (int64_t l = 0; l < std::min<int64_t>(left, kLanes<T>); ++l)
    lanes[l] = factors[index[l]].*member;
  return load(lanes);
}

// Replaces the dot products of row i's pairs by the coefficients (G_ij + G_ji) / temperature. factors: those of the
// stream's rows.
template <class T>
void pair_coefficients(const ContrastiveArgs<T>& args, const RowFactors<T>* factors, int64_t i, const int32_t* index,
                       const IntegerOf<T>* all_flags, int64_t count, T* values) {
  using Factors = RowFactors<T>;
  const Factors row = factors[i];
  const bool fixed = fixed_shift(args);
  const Vec<T> scale = splat(static_cast<T>(1 / args.temperature)), row_shift = fixed ? scale : splat(row.lse);
  for (int64_t c = 0; c < count; c += kLanes<T>) {
    const auto column = [&](T Factors::* member) { return of_columns(factors, member, index + c, count - c); };
    const IntegerOf<T>* flags = all_flags + c;
    const Vec<T> logit = load(values + c) * scale;
    const Vec<T> e = exp<T>(logit - row_shift), e_t = fixed ? e : exp<T>(logit - column(&Factors::lse));
    Vec<T> total = keep(flagged<T>(flags, kInP), e * splat(row.denominator) + splat(row.positive));
    total += keep(flagged<T>(flags, kInTransposedP), e_t * column(&Factors::denominator) + column(&Factors::positive));
    total += keep(flagged<T>(flags, kInQ), splat(row.extra));
    total += keep(flagged<T>(flags, kInTransposedQ), column(&Factors::extra));
    store(values + c, total * scale);
  }
}

// out (streams, count, depth) = the part of the gradient that comes from P and Q.
template <class T>
void positive_grad(const Problem<T>& problem, const RowFactors<T>* factors, bool use_extra, T* out) {
  const ContrastiveArgs<T>& args = problem.args;
  const ContrastiveMasks& masks = args.masks;
  const Listed listed{use_extra, masks.positives != masks.positives_t || (use_extra && masks.extra != masks.extra_t)};
  const int64_t tasks = (args.count + kTaskRows - 1) / kTaskRows;
  const PairScratch<T> scratch(worker_count(args.threads, tasks));
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const int64_t first = task * kTaskRows, end = std::min(args.count, first + kTaskRows);
    const PairLists<T> lists = scratch.of(worker);
    for (int64_t s = 0; s < args.streams; ++s)
      std::fill(out + (s * args.count + first) * problem.depth, out + (s * args.count + end) * problem.depth, T(0));
    for_each_row_block(args, task, listed, lists, [&](int64_t s, int64_t anchor, int64_t at, int64_t count) {
      const T* x = problem.stream(s);
      const int32_t* index = lists.index + at;
      const int64_t i = args.first + anchor;
      row_products(x + i * problem.depth, x, problem.depth, index, count, lists.values);
      pair_coefficients(args, factors + s * args.rows, i, index, lists.flags + at, count, lists.values);
      row_mix(lists.values, x, problem.depth, index, count, out + (s * args.count + anchor) * problem.depth);
    });
  });
}

}  // namespace
}  // namespace hpk::HPK_ISA
