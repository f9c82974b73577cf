// The part of the sparse contrastive kernels that comes from the pairs of P and Q: row by row, pair by pair.
//
// A task takes kTaskRows rows through one block of columns after another: neighbouring patches have much the same positives, so
// their vectors are still in the second-level cache when the next row needs them.
#pragma once

#include "cpu/kernels/contrastive_problem.h"
#include "cpu/kernels/contrastive_rows.h"
#include "cpu/thread_pool.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int64_t kTaskRows = 112;
constexpr int64_t kBlockWords = 64;  // words of bits, 32 columns each, per block

// Why a pair (i, j) is listed.
enum PairFlag { kInP = 1, kInQ = 2, kInTransposedP = 4, kInTransposedQ = 8 };

// The pairs of a row within a block of columns, with room for what they are worked into. One per worker.
template <class T>
class PairList {
 public:
  explicit PairList(int64_t workers)
      : stride_(kBlockWords * 32 + 2 * kRowSlack), index_(workers * stride_), flags_(workers * stride_), values_(workers * stride_) {}

  // Switches to a worker's memory.
  struct View {
    int32_t* index;
    IntegerOf<T>* flags;
    T* values;
  };
  View of(int worker) const {
    return {index_.get() + worker * stride_, flags_.get() + worker * stride_, values_.get() + worker * stride_};
  }

 private:
  int64_t stride_;
  Scratch<int32_t> index_;
  Scratch<IntegerOf<T>> flags_;
  Scratch<T> values_;
};

// Lists the pairs of row i in words [begin, end); returns their number. Flags past the end are zero for one vector.
template <class View>
int64_t list_pairs(const ContrastiveMasks& masks, bool use_extra, bool transposed, int64_t i, int64_t begin, int64_t end, const View& list) {
  int64_t count = 0;
  for (int64_t w = begin; w < end; ++w) {
    const int64_t at = i * masks.words + w;
    const uint32_t p = without_diagonal(masks.positives[at], i, w), q = use_extra ? without_diagonal(masks.extra[at], i, w) : 0;
    const uint32_t p_t = transposed ? without_diagonal(masks.positives_t[at], i, w) : p;
    const uint32_t q_t = transposed && use_extra ? without_diagonal(masks.extra_t[at], i, w) : q;
    for (uint32_t left = p | q | p_t | q_t; left; left &= left - 1, ++count) {
      const int k = __builtin_ctz(left);
      list.index[count] = static_cast<int32_t>(32 * w + k);
      list.flags[count] = ((p >> k) & 1) * kInP | ((q >> k) & 1) * kInQ | ((p_t >> k) & 1) * kInTransposedP | ((q_t >> k) & 1) * kInTransposedQ;
    }
  }
  std::fill(list.flags + count, list.flags + count + kRowSlack, 0);
  return count;
}

// Runs f(row i, number of listed pairs) over rows and blocks of columns; every row visits its blocks in ascending order.
template <class T, class F>
void for_each_row_block(const ContrastiveArgs<T>& args, int64_t task, bool use_extra, bool transposed, const typename PairList<T>::View& list, F&& f) {
  const int64_t end_row = std::min(args.rows, (task + 1) * kTaskRows), words = (args.rows + 31) / 32;
  for (int64_t w = 0; w < words; w += kBlockWords)
    for (int64_t i = task * kTaskRows; i < end_row; ++i) {
      const int64_t count = list_pairs(args.masks, use_extra, transposed, i, w, std::min(words, w + kBlockWords), list);
      if (count) f(i, count);
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
    for (int64_t c = 0; c < count; c += kLanes<T>) highest = max(highest, flagged<T>(flags + c, kInP) ? load(dots + c) * scale : none);
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
  const int64_t per_stream = (args.rows + kTaskRows - 1) / kTaskRows, tasks = args.streams * per_stream;
  const PairList<T> lists(worker_count(args.threads, tasks));
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const int64_t s = task / per_stream, first = task % per_stream * kTaskRows;
    const T* x = problem.stream(s);
    const auto list = lists.of(worker);
    RowStats<T> stats[kTaskRows];
    std::fill(stats, stats + kTaskRows, RowStats<T>{first_shift(args), 0, 0, 0});
    for_each_row_block(args, task % per_stream, args.masks.extra != nullptr, false, list, [&](int64_t i, int64_t count) {
      row_products(x + i * problem.depth, x, problem.depth, list.index, count, list.values);
      stats[i - first].add(args, list.values, list.flags, count);
    });
    for (int64_t i = first; i < std::min(args.rows, first + kTaskRows); ++i) {
      const RowStats<T>& row = stats[i - first];
      const int64_t at = s * args.rows + i;
      out.lse[at] = log_of_two_sums(row.shift, row.sum, shift ? shift[at] : T(0), sum ? sum[at] : T(0));
      out.pos[at] = row.pos;
      out.ext[at] = row.ext;
    }
  });
}

// ---- gradient

// One of the columns' factors for a vector of pairs.
template <class T>
inline Vec<T> of_columns(const RowFactors<T>* factors, T RowFactors<T>::*member, const int32_t* index, int64_t left) {
  T lanes[kLanes<T>] = {};
  for (int64_t l = 0; l < std::min<int64_t>(left, kLanes<T>); ++l) lanes[l] = factors[index[l]].*member;
  return load(lanes);
}

// Replaces dot products by the coefficients (G_ij + G_ji) / temperature. factors: those of the stream's rows.
template <class T, class View>
void pair_coefficients(const ContrastiveArgs<T>& args, const RowFactors<T>* factors, int64_t i, const View& list, int64_t count) {
  using Factors = RowFactors<T>;
  const Factors row = factors[i];
  const bool fixed = fixed_shift(args);
  const Vec<T> scale = splat(static_cast<T>(1 / args.temperature)), row_shift = fixed ? scale : splat(row.lse);
  for (int64_t c = 0; c < count; c += kLanes<T>) {
    const auto column = [&](T Factors::*member) { return of_columns(factors, member, list.index + c, count - c); };
    const IntegerOf<T>* flags = list.flags + c;
    const Vec<T> logit = load(list.values + c) * scale;
    const Vec<T> e = exp<T>(logit - row_shift), e_t = fixed ? e : exp<T>(logit - column(&Factors::lse));
    Vec<T> total = keep(flagged<T>(flags, kInP), e * splat(row.denominator) + splat(row.positive));
    total += keep(flagged<T>(flags, kInTransposedP), e_t * column(&Factors::denominator) + column(&Factors::positive));
    total += keep(flagged<T>(flags, kInQ), splat(row.extra));
    total += keep(flagged<T>(flags, kInTransposedQ), column(&Factors::extra));
    store(list.values + c, total * scale);
  }
}

// out (streams, rows, depth) = the part of the gradient that comes from P and Q.
template <class T>
void positive_grad(const Problem<T>& problem, const RowFactors<T>* factors, bool use_extra, T* out) {
  const ContrastiveArgs<T>& args = problem.args;
  const ContrastiveMasks& masks = args.masks;
  const bool transposed = masks.positives != masks.positives_t || (use_extra && masks.extra != masks.extra_t);
  const int64_t per_stream = (args.rows + kTaskRows - 1) / kTaskRows, tasks = args.streams * per_stream;
  const PairList<T> lists(worker_count(args.threads, tasks));
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const int64_t s = task / per_stream, first = task % per_stream * kTaskRows, end = std::min(args.rows, first + kTaskRows);
    const T* x = problem.stream(s);
    T* out_stream = out + s * args.rows * problem.depth;
    const auto list = lists.of(worker);
    std::fill(out_stream + first * problem.depth, out_stream + end * problem.depth, T(0));
    for_each_row_block(args, task % per_stream, use_extra, transposed, list, [&](int64_t i, int64_t count) {
      row_products(x + i * problem.depth, x, problem.depth, list.index, count, list.values);
      pair_coefficients(args, factors + s * args.rows, i, list, count);
      row_mix(list.values, x, problem.depth, list.index, count, out_stream + i * problem.depth);
    });
  });
}

}  // namespace
}  // namespace hpk::HPK_ISA
