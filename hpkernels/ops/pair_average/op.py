"""The weighted average of a contrastive loss: one op on Triton, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.ops.common.autograd import refuse_second_backward
from hpkernels.ops.pair_average import reference
from hpkernels.ops.pair_average.rows import Rows, Weights

_ROWS = "Tensor lse, Tensor pos, Tensor ext, Tensor n_pos, Tensor n_ext"
_WEIGHTS = "Tensor? extra_tensor, float extra, SymInt images, SymInt all_images, str weighting"


def pair_average(rows: Rows, weights: Weights, scale: float, backend: str) -> Tensor:
    """scale times the average that reference.py says, differentiable in lse, pos, ext and lambda."""
    extra, number = (weights.extra, 0.0) if isinstance(weights.extra, Tensor) else (None, float(weights.extra))
    learned = extra is not None and extra.requires_grad
    on_triton = backend == "triton" or (backend == dispatch.FASTEST and rows.lse.is_cuda)
    if learned or not on_triton:  # plain autograd
        return reference.pair_average(rows, weights) * scale
    loss, _ = _pair_average(*rows, extra, number, *weights[1:], scale)
    return loss


def _weights(extra_tensor: Tensor | None, extra: float, images: int, all_images: int, weighting: str) -> Weights:
    return Weights(extra if extra_tensor is None else extra_tensor, images, all_images, weighting)


@torch.library.custom_op(
    "hpkernels::pair_average", mutates_args=(), schema=f"({_ROWS}, {_WEIGHTS}, float scale) -> (Tensor, Tensor)"
)
def _pair_average(*rows_weights_scale):
    rows, weights, scale = rows_weights_scale[:5], rows_weights_scale[5:10], rows_weights_scale[10]
    average = dispatch.implementation("pair_average", "triton").pair_average
    return average(Rows(*rows), _weights(*weights), scale)


@_pair_average.register_fake
def _(lse, pos, ext, n_pos, n_ext, *weights_scale):
    weights = _weights(*weights_scale[:5])
    return lse.new_empty(()), lse.new_empty((weights.sums, weights.images))


@torch.library.custom_op(
    "hpkernels::pair_average_grad",
    mutates_args=(),
    schema=f"(Tensor grad, {_ROWS}, {_WEIGHTS}, Tensor inverses) -> (Tensor, Tensor, Tensor)",
)
def _pair_average_grad(grad, *rows_weights_inverses):
    rows, weights, inverses = rows_weights_inverses[:5], rows_weights_inverses[5:10], rows_weights_inverses[10]
    gradient = dispatch.implementation("pair_average", "triton").pair_average_grad
    return gradient(grad, Rows(*rows), _weights(*weights), inverses)


@_pair_average_grad.register_fake
def _(grad, lse, *_):
    return tuple(torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(3))


refuse_second_backward(_pair_average_grad)


def _setup(ctx, inputs, output):
    *rows, extra_tensor, ctx.extra, ctx.images, ctx.all_images, ctx.weighting, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # for the one that has none
    ctx.save_for_backward(*rows, extra_tensor, output[1])


def _backward(ctx, grad, _):
    *rows, extra_tensor, inverses = ctx.saved_tensors
    weights = (extra_tensor, ctx.extra, ctx.images, ctx.all_images, ctx.weighting)
    return *_pair_average_grad(grad, *rows, *weights, inverses), *[None] * 8


_pair_average.register_autograd(_backward, setup_context=_setup)
