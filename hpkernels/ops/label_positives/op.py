"""The positive terms of losses whose pairs are given by labels, as torch ops: linear memory, no bits for pairs.

`Labelled` says what they take, reference.py what they give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.common.autograd import refuse_second_backward
from hpkernels.ops.label_positives import blocked, reference
from hpkernels.ops.label_positives.rows import Labelled

# Labelled, flat, as torch wants it.
_ROWS = "Tensor x, Tensor counts, Tensor classes, Tensor? groups, Tensor? keys, Tensor? key_classes, Tensor? key_groups"


def logit_mean(rows: Labelled, temperature: float, backend: str) -> Tensor:
    """(1 / |P_i|) sum_j P_ij <x_i, k_j> / temperature, (N,); 0 without positives. Differentiable in x and keys."""
    if backend == "reference":  # plain autograd, so that a second backward works
        return reference.logit_mean(rows, temperature)
    return _logit_mean(*rows, temperature)


def softplus_mean(rows: Labelled, lse: Tensor, temperature: float, backend: str) -> Tensor:
    """(1 / |P_i|) sum_j P_ij log(1 + exp(lse_i - <x_i, k_j> / temperature)), (N,). Differentiable in x, lse, keys."""
    if backend == "reference":
        return reference.softplus_mean(rows, lse, temperature)
    return _softplus_mean(*rows, lse, temperature)


@torch.library.custom_op(
    "hpkernels::label_logit_mean", mutates_args=(), schema=f"({_ROWS}, float temperature) -> Tensor"
)
def _logit_mean(*rows_temperature):
    *rows, temperature = rows_temperature
    return blocked.logit_mean(Labelled(*rows), temperature)


@_logit_mean.register_fake
def _(x, *_):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape[:1], dtype=dtype, device=x.device)


@torch.library.custom_op(
    "hpkernels::label_logit_mean_grad",
    mutates_args=(),
    schema=f"({_ROWS}, float temperature, Tensor grad) -> (Tensor, Tensor)",
)
def _logit_mean_grad(*rows_temperature_grad):
    """Gradients of x and of the keys (empty without keys)."""
    *rows, temperature, grad = rows_temperature_grad
    grad_x, grad_keys = blocked.logit_mean_grad(Labelled(*rows), temperature, grad)
    return grad_x, grad_x.new_empty(0) if grad_keys is None else grad_keys


@_logit_mean_grad.register_fake
def _(*rows_temperature_grad):
    return _like_rows(Labelled(*rows_temperature_grad[:-2]))


@torch.library.custom_op(
    "hpkernels::label_softplus_mean", mutates_args=(), schema=f"({_ROWS}, Tensor lse, float temperature) -> Tensor"
)
def _softplus_mean(*rows_lse_temperature):
    *rows, lse, temperature = rows_lse_temperature
    return blocked.softplus_mean(Labelled(*rows), lse, temperature)


@_softplus_mean.register_fake
def _(*rows_lse_temperature):
    return torch.empty_like(rows_lse_temperature[-2])


@torch.library.custom_op(
    "hpkernels::label_softplus_mean_grad",
    mutates_args=(),
    schema=f"({_ROWS}, Tensor lse, float temperature, Tensor grad) -> (Tensor, Tensor, Tensor)",
)
def _softplus_mean_grad(*rows_lse_temperature_grad):
    """Gradients of x, of the keys (empty without keys) and of lse."""
    *rows, lse, temperature, grad = rows_lse_temperature_grad
    grad_x, grad_keys, grad_lse = blocked.softplus_mean_grad(Labelled(*rows), lse, temperature, grad)
    return grad_x, grad_x.new_empty(0) if grad_keys is None else grad_keys, grad_lse


@_softplus_mean_grad.register_fake
def _(*rows_lse_temperature_grad):
    *rows, lse, _, _ = rows_lse_temperature_grad
    return *_like_rows(Labelled(*rows)), torch.empty_like(lse)


def _like_rows(rows: Labelled) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(rows.x, memory_format=torch.contiguous_format)
    if rows.keys is None:
        return grad_x, rows.x.new_empty(0)
    return grad_x, torch.empty_like(rows.keys, memory_format=torch.contiguous_format)


refuse_second_backward(_logit_mean_grad)
refuse_second_backward(_softplus_mean_grad)


def _save(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _logit_mean_backward(ctx, grad):
    rows = Labelled(*ctx.saved_tensors)
    grad_x, grad_keys = _logit_mean_grad(*rows, ctx.temperature, grad)
    return *Labelled(grad_x, None, None, keys=None if rows.keys is None else grad_keys), None


def _softplus_mean_backward(ctx, grad):
    *tensors, lse = ctx.saved_tensors
    rows = Labelled(*tensors)
    grad_x, grad_keys, grad_lse = _softplus_mean_grad(*rows, lse, ctx.temperature, grad)
    return *Labelled(grad_x, None, None, keys=None if rows.keys is None else grad_keys), grad_lse, None


_logit_mean.register_autograd(_logit_mean_backward, setup_context=_save)
_softplus_mean.register_autograd(_softplus_mean_backward, setup_context=_save)
