"""The positive terms of losses whose pairs are given by labels, as torch ops: linear memory, no bits for pairs.

Classes and groups (reference.py) are integers below N + M + 1; -1 takes no part. counts: |P_i|, int64 (N,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.common.autograd import refuse_second_backward
from hpkernels.ops.label_positives import blocked, reference


def logit_mean(
    x: Tensor,
    counts: Tensor,
    classes: Tensor,
    groups: Tensor | None,
    keys: Tensor | None,
    key_classes: Tensor | None,
    key_groups: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    """(1 / |P_i|) sum_j P_ij <x_i, k_j> / temperature, (N,); 0 without positives. Differentiable in x and keys."""
    if backend == "reference":  # plain autograd, so that a second backward works
        return reference.logit_mean(x, classes, groups, keys, key_classes, key_groups, temperature)
    return _logit_mean(x, counts, classes, groups, keys, key_classes, key_groups, temperature)


def softplus_mean(
    x: Tensor,
    lse: Tensor,
    counts: Tensor,
    classes: Tensor,
    groups: Tensor | None,
    keys: Tensor | None,
    key_classes: Tensor | None,
    key_groups: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    """(1 / |P_i|) sum_j P_ij log(1 + exp(lse_i - <x_i, k_j> / temperature)), (N,). Differentiable in x, lse, keys."""
    if backend == "reference":
        return reference.softplus_mean(x, lse, classes, groups, keys, key_classes, key_groups, temperature)
    return _softplus_mean(x, lse, counts, classes, groups, keys, key_classes, key_groups, temperature)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("hpkernels::label_logit_mean", mutates_args=())
def _logit_mean(
    x: Tensor,
    counts: Tensor,
    classes: Tensor,
    groups: Tensor | None,
    keys: Tensor | None,
    key_classes: Tensor | None,
    key_groups: Tensor | None,
    temperature: float,
) -> Tensor:
    return blocked.logit_mean(x, counts, classes, groups, keys, key_classes, key_groups, temperature)


@_logit_mean.register_fake
def _(x, *_):
    return torch.empty(x.shape[:1], dtype=_accumulator(x), device=x.device)


@torch.library.custom_op("hpkernels::label_logit_mean_grad", mutates_args=())
def _logit_mean_grad(
    grad: Tensor,
    x: Tensor,
    counts: Tensor,
    classes: Tensor,
    groups: Tensor | None,
    keys: Tensor | None,
    key_classes: Tensor | None,
    key_groups: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the keys (empty without keys)."""
    grad_x, grad_keys = blocked.logit_mean_grad(
        grad, x, counts, classes, groups, keys, key_classes, key_groups, temperature
    )
    return grad_x, x.new_empty(0) if grad_keys is None else grad_keys


@_logit_mean_grad.register_fake
def _(grad, x, counts, classes, groups, keys, key_classes, key_groups, temperature):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _like_keys(x, keys)


@torch.library.custom_op("hpkernels::label_softplus_mean", mutates_args=())
def _softplus_mean(
    x: Tensor,
    lse: Tensor,
    counts: Tensor,
    classes: Tensor,
    groups: Tensor | None,
    keys: Tensor | None,
    key_classes: Tensor | None,
    key_groups: Tensor | None,
    temperature: float,
) -> Tensor:
    return blocked.softplus_mean(x, lse, counts, classes, groups, keys, key_classes, key_groups, temperature)


@_softplus_mean.register_fake
def _(x, lse, *_):
    return torch.empty_like(lse)


@torch.library.custom_op("hpkernels::label_softplus_mean_grad", mutates_args=())
def _softplus_mean_grad(
    grad: Tensor,
    x: Tensor,
    lse: Tensor,
    counts: Tensor,
    classes: Tensor,
    groups: Tensor | None,
    keys: Tensor | None,
    key_classes: Tensor | None,
    key_groups: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of lse and of the keys (empty without keys)."""
    grad_x, grad_lse, grad_keys = blocked.softplus_mean_grad(
        grad, x, lse, counts, classes, groups, keys, key_classes, key_groups, temperature
    )
    return grad_x, grad_lse, x.new_empty(0) if grad_keys is None else grad_keys


@_softplus_mean_grad.register_fake
def _(grad, x, lse, counts, classes, groups, keys, key_classes, key_groups, temperature):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(lse), _like_keys(x, keys)


def _like_keys(x: Tensor, keys: Tensor | None) -> Tensor:
    return x.new_empty(0) if keys is None else torch.empty_like(keys, memory_format=torch.contiguous_format)


refuse_second_backward(_logit_mean_grad)
refuse_second_backward(_softplus_mean_grad)


def _save(ctx, inputs, output):
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _logit_mean_backward(ctx, grad):
    tensors = ctx.saved_tensors
    grad_x, grad_keys = _logit_mean_grad(grad, *tensors, ctx.temperature)
    return grad_x, None, None, None, None if tensors[4] is None else grad_keys, None, None, None


def _softplus_mean_backward(ctx, grad):
    tensors = ctx.saved_tensors
    grad_x, grad_lse, grad_keys = _softplus_mean_grad(grad, *tensors, ctx.temperature)
    return grad_x, grad_lse, None, None, None, None if tensors[5] is None else grad_keys, None, None, None


_logit_mean.register_autograd(_logit_mean_backward, setup_context=_save)
_softplus_mean.register_autograd(_softplus_mean_backward, setup_context=_save)
