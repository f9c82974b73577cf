// The contrastive statistics and gradient for a dense denominator: every pair is evaluated, tile by tile.
#include "cpu/contrastive/dense_grad.h"
#include "cpu/contrastive/dense_stats.h"

namespace hpk::HPK_ISA {
namespace {

template <class T>
void dense_stats(const ContrastiveArgs<T>& args, bool all, const ContrastiveStats<T>& out) {
  const DenseMasks<T> masks(args, all);
  for (int64_t s = 0; s < args.streams; ++s) {
    const T* x = args.x + s * args.rows * args.depth;
    T *lse = out.lse + s * args.count, *pos = out.pos + s * args.count, *ext = out.ext + s * args.count;
    if (args.all_anchors()) {
      DenseStats<T, DenseMasks<T>>(args, masks, x).run(lse, pos, ext);
    } else {
      RangeStats<T, DenseMasks<T>>(args, masks, x).run(lse, pos, ext);
    }
  }
}

template <class T>
void dense_grad(const ContrastiveArgs<T>& args, bool all, const ContrastiveGrads<T>& grads) {
  const DenseMasks<T> masks(args, all);
  DenseGrad<T, DenseMasks<T>> grad(args, masks);
  for (int64_t s = 0; s < args.streams; ++s)
    grad.run(args.x + s * args.rows * args.depth, grads, s * args.rows, grads.grad_x + s * args.count * args.depth);
}

}  // namespace

void contrastive_dense_stats(const ContrastiveArgs<float>& args, bool all, const ContrastiveStats<float>& out) {
  dense_stats(args, all, out);
}
void contrastive_dense_stats(const ContrastiveArgs<double>& args, bool all, const ContrastiveStats<double>& out) {
  dense_stats(args, all, out);
}
void contrastive_dense_grad(const ContrastiveArgs<float>& args, bool all, const ContrastiveGrads<float>& grads) {
  dense_grad(args, all, grads);
}
void contrastive_dense_grad(const ContrastiveArgs<double>& args, bool all, const ContrastiveGrads<double>& grads) {
  dense_grad(args, all, grads);
}

}  // namespace hpk::HPK_ISA
