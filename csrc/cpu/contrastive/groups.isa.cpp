// The log-sum-exp over a denominator by groups, and its gradient: the dense kernels with masks of groups.
#include "cpu/contrastive/dense_grad.h"
#include "cpu/contrastive/dense_stats.h"
#include "cpu/contrastive/group_masks.h"

namespace hpk::HPK_ISA {
namespace {

template <class T>
void group_lse(const ContrastiveArgs<T>& args, const ContrastiveGroups& groups, T* lse) {
  const GroupMasks<T> masks(args, groups);
  const Scratch<T> unused(2 * args.count);  // sums over positives, of which there are none
  T *pos = unused.get(), *ext = pos + args.count;
  if (args.all_anchors()) {
    DenseStats<T, GroupMasks<T>>(args, masks, args.x).run(lse, pos, ext);
  } else {
    RangeStats<T, GroupMasks<T>>(args, masks, args.x).run(lse, pos, ext);
  }
}

template <class T>
void group_grad(const ContrastiveArgs<T>& args, const ContrastiveGroups& groups, const ContrastiveGrads<T>& grads) {
  const GroupMasks<T> masks(args, groups);
  DenseGrad<T, GroupMasks<T>>(args, masks).run(args.x, grads, 0, grads.grad_x);
}

}  // namespace

void contrastive_group_lse(const ContrastiveArgs<float>& args, const ContrastiveGroups& groups, float* lse) {
  group_lse(args, groups, lse);
}
void contrastive_group_lse(const ContrastiveArgs<double>& args, const ContrastiveGroups& groups, double* lse) {
  group_lse(args, groups, lse);
}
void contrastive_group_grad(const ContrastiveArgs<float>& args, const ContrastiveGroups& groups,
                            const ContrastiveGrads<float>& grads) {
  group_grad(args, groups, grads);
}
void contrastive_group_grad(const ContrastiveArgs<double>& args, const ContrastiveGroups& groups,
                            const ContrastiveGrads<double>& grads) {
  group_grad(args, groups, grads);
}

}  // namespace hpk::HPK_ISA
