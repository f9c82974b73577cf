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
from hpkernels.ops.common.autograd import refuse_second_backward
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

    All N rows are anchors here; `hpkernels.losses.panels` takes a range of them.

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
    return contrastive_stats_rows(
        x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, 0, backend
    )


@torch.library.custom_op("hpkernels::contrastive_stats", mutates_args=())
def contrastive_stats_rows(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    first_row: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics (S, n) of the n anchors i = first_row + r; row r of P and Q holds its pairs with all N rows.

    Differentiable for all anchors at once only: the gradient needs the row gradients of all of them.
    """
    stats = dispatch.implementation("contrastive", backend).contrastive_stats
    return stats(x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, first_row)


@contrastive_stats_rows.register_fake
def _(x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, first_row, backend):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], positives.shape[0])
    return tuple(torch.empty(shape, dtype=dtype, device=x.device) for _ in range(3))


@torch.library.custom_op("hpkernels::contrastive_grad", mutates_args=())
def contrastive_grad_rows(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    first_row: int,
    lse: Tensor,
    grad_lse: Tensor,
    grad_pos: Tensor,
    grad_ext: Tensor,
    backend: str,
) -> Tensor:
    """The gradient (S, n, D) with respect to the anchors' rows, from lse and the row gradients of all N rows."""
    grad = dispatch.implementation("contrastive", backend).contrastive_grad
    masks = (positives, positives_t, extra, extra_t, negatives)
    return grad(x, *masks, denominator, temperature, first_row, lse, grad_lse, grad_pos, grad_ext)


@contrastive_grad_rows.register_fake
def _(x, positives, positives_t, extra, extra_t, negatives, denominator, temperature, first_row, *tables_and_backend):
    return x.new_empty((x.shape[0], positives.shape[0], x.shape[2]))


refuse_second_backward(contrastive_grad_rows)


def _setup(ctx, inputs, output):
    *tensors, ctx.denominator, ctx.temperature, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0])


def _backward(ctx, grad_lse, grad_pos, grad_ext):
    *tensors, lse = ctx.saved_tensors
    if lse.shape[1] != tensors[0].shape[1]:
        raise RuntimeError("hpkernels: statistics of a range of anchors are differentiated by hpkernels.losses.panels")
    grads = (grad_lse, grad_pos, grad_ext)
    grad_x = contrastive_grad_rows(*tensors, ctx.denominator, ctx.temperature, 0, lse, *grads, ctx.backend)
    return grad_x, *[None] * 9


contrastive_stats_rows.register_autograd(_backward, setup_context=_setup)
