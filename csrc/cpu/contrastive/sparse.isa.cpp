// The contrastive statistics and gradient for a sparse denominator: only the pairs that bits name are ever evaluated.
#include "cpu/contrastive/negatives.h"
#include "cpu/contrastive/negatives_grad.h"
#include "cpu/contrastive/negatives_range.h"
#include "cpu/contrastive/positives.h"

namespace hpk::HPK_ISA {
namespace {

template <class T>
void sparse_stats(const ContrastiveArgs<T>& args, const ContrastiveStats<T>& out) {
  const Problem<T> problem(args);
  if (!args.masks.negatives) return positive_stats<T>(problem, nullptr, nullptr, out);
  const Scratch<T> shift(args.streams * args.count), sum(args.streams * args.count);
  negative_stats(problem, shift.get(), sum.get());
  positive_stats<T>(problem, shift.get(), sum.get(), out);
}

template <class T>
void sparse_grad(const ContrastiveArgs<T>& args, const ContrastiveGrads<T>& grads) {
  const Problem<T> problem(args);
  const int64_t all = args.streams * args.rows, count = args.streams * args.count;
  const Scratch<RowFactors<T>> factors(all);
  for (int64_t i = 0; i < all; ++i)
    factors[i] = row_factors(args, grads, i);
  const bool padded = problem.depth != args.depth;
  const Scratch<T> wide(padded ? count * problem.depth : 0);
  T* out = padded ? wide.get() : grads.grad_x;
  positive_grad(problem, factors.get(), args.masks.extra && any_nonzero(grads.grad_ext, all), out);
  if (args.masks.negatives && args.all_anchors()) NegativeGrad<T>(problem, factors.get(), out);
  if (args.masks.negatives && !args.all_anchors()) RangeNegativeGrad<T>(problem, factors.get(), out);
  if (!padded) return;
  for (int64_t i = 0; i < count; ++i)
    std::copy(out + i * problem.depth, out + i * problem.depth + args.depth, grads.grad_x + i * args.depth);
}

}  // namespace

void contrastive_sparse_stats(const ContrastiveArgs<float>& args, const ContrastiveStats<float>& out) {
  sparse_stats(args, out);
}
void contrastive_sparse_stats(const ContrastiveArgs<double>& args, const ContrastiveStats<double>& out) {
  sparse_stats(args, out);
}
void contrastive_sparse_grad(const ContrastiveArgs<float>& args, const ContrastiveGrads<float>& grads) {
  sparse_grad(args, grads);
}
void contrastive_sparse_grad(const ContrastiveArgs<double>& args, const ContrastiveGrads<double>& grads) {
  sparse_grad(args, grads);
}

}  // namespace hpk::HPK_ISA
