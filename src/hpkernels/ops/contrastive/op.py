"""Statistics of a masked contrastive loss and their gradient, as torch ops.

Three numbers a row carry everything a loss of this family needs (equations in reference.py): the log-sum-exp over the
denominator set E, and the sums of the logits over the positives P and the extra positives Q. The losses are plain
torch over these (S, N) tables, so their weightings and lambda never reach a kernel, and the gradient op receives
just dL/dlse, dL/dpos and dL/dext.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.ops._autograd import refuse_second_backward
from hpkernels.ops.contrastive import reference


def contrastive_stats(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row statistics (lse, pos, ext), each (S, N), of unit rows x (S, N, D); differentiable in x.

    Args:
        x: (S, N, D), S streams that share all masks.
        positives, extra: packed pairs (N, W); `_t` their transposes, None when symmetric. The diagonal is ignored.
        negatives: packed (R, W), R divides N; row i uses row i mod R.
        denominator: "all": E = every j != i (negatives None). "dense" or "sparse": E = P and the negatives' bits,
            evaluated by sweeping all tiles or by gathering the columns each negatives row names. Same result.
    """
    if backend == "reference":  # plain autograd, so that a second backward works
        return reference.contrastive_stats(
            x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, 0
        )
    return _contrastive_stats(
        x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, backend
    )


@torch.library.custom_op("hpkernels::contrastive_stats", mutates_args=())
def _contrastive_stats(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = dispatch.implementation("contrastive", backend).contrastive_stats
    return stats(x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, 0)


@_contrastive_stats.register_fake
def _(x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, backend):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(torch.empty(x.shape[:2], dtype=dtype, device=x.device) for _ in range(3))


@torch.library.custom_op("hpkernels::contrastive_grad", mutates_args=())
def _contrastive_grad(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    lse: Tensor,
    grad_lse: Tensor,
    grad_pos: Tensor,
    grad_ext: Tensor,
    backend: str,
) -> Tensor:
    grad = dispatch.implementation("contrastive", backend).contrastive_grad
    masks = (positives, positives_t, extra, extra_t, negatives)
    return grad(x, *masks, denominator, temperature, 0, lse, grad_lse, grad_pos, grad_ext)


@_contrastive_grad.register_fake
def _(x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, lse, *grads_and_backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


refuse_second_backward(_contrastive_grad)


def _setup(ctx, inputs, output):
    *tensors, ctx.denominator, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0])


def _backward(ctx, grad_lse, grad_pos, grad_ext):
    *tensors, lse = ctx.saved_tensors
    grads = (grad_lse, grad_pos, grad_ext)
    grad_x = _contrastive_grad(*tensors, ctx.denominator, ctx.temperature, lse, *grads, ctx.backend)
    return grad_x, *[None] * 8


_contrastive_stats.register_autograd(_backward, setup_context=_setup)
