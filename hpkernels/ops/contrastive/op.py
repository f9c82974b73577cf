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
from hpkernels.ops.contrastive.masks import Masks

# Masks, as the registered ops take them: flat, as torch wants it.
_MASKS = (
    "Tensor positives, Tensor? positives_t, Tensor? extra, Tensor? extra_t, Tensor? negatives, str denominator, "
    "SymInt first_row"
)


def contrastive_stats(x: Tensor, masks: Masks, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row statistics (lse, pos, ext), each (S, N), of unit rows x (S, N, D); differentiable in x.

    All N rows are anchors here; `hpkernels.losses.panels` takes a range of them. The S streams share all masks.
    """
    if backend == "reference":  # plain autograd, so that a second backward works
        return reference.contrastive_stats(x, masks, temperature)
    return contrastive_stats_rows(x, *masks, temperature, backend)


def _form(masks: Masks) -> str:
    """Of a call, in the tables of the faster backend."""
    return "/sparse" if masks.denominator == "sparse" else "/dense"


@torch.library.custom_op(
    "hpkernels::contrastive_stats",
    mutates_args=(),
    schema=f"(Tensor x, {_MASKS}, float temperature, str backend) -> (Tensor, Tensor, Tensor)",
)
def contrastive_stats_rows(x, *masks_temperature_backend):
    """The statistics (S, n) of a range of n anchors.

    Differentiable for all anchors at once only: the gradient needs the row gradients of all of them.
    """
    *masks, temperature, backend = masks_temperature_backend
    masks = Masks(*masks)
    return dispatch.function("contrastive", "contrastive_stats", backend, x, _form(masks))(x, masks, temperature)


@contrastive_stats_rows.register_fake
def _(x, positives, *_):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], positives.shape[0])
    return tuple(torch.empty(shape, dtype=dtype, device=x.device) for _ in range(3))


@torch.library.custom_op(
    "hpkernels::contrastive_grad",
    mutates_args=(),
    schema=f"(Tensor x, {_MASKS}, float temperature, Tensor lse, Tensor grad_lse, Tensor grad_pos, Tensor grad_ext, "
    "str backend) -> Tensor",
)
def contrastive_grad_rows(x, *masks_temperature_tables_backend):
    """The gradient (S, n, D) with respect to the anchors' rows, from lse and the row gradients of all N rows."""
    *masks, temperature, lse, grad_lse, grad_pos, grad_ext, backend = masks_temperature_tables_backend
    masks = Masks(*masks)
    grad = dispatch.function("contrastive", "contrastive_grad", backend, x, _form(masks))
    return grad(x, masks, temperature, lse, grad_lse, grad_pos, grad_ext)


@contrastive_grad_rows.register_fake
def _(x, positives, *_):
    return x.new_empty((x.shape[0], positives.shape[0], x.shape[2]))


refuse_second_backward(contrastive_grad_rows)


def _setup(ctx, inputs, output):
    x, *masks, ctx.temperature, ctx.backend = inputs
    bits, ctx.options = masks[:5], masks[5:]
    ctx.save_for_backward(x, *bits, output[0])


def _backward(ctx, grad_lse, grad_pos, grad_ext):
    x, *bits, lse = ctx.saved_tensors
    if lse.shape[1] != x.shape[1]:
        raise RuntimeError("hpkernels: statistics of a range of anchors are differentiated by hpkernels.losses.panels")
    grads = (grad_lse, grad_pos, grad_ext)
    grad_x = contrastive_grad_rows(x, *bits, *ctx.options, ctx.temperature, lse, *grads, ctx.backend)
    return grad_x, *[None] * 9


contrastive_stats_rows.register_autograd(_backward, setup_context=_setup)
