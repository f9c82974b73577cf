"""Neighbour weights from attention and nine-tap mixing as torch ops; `hpkernels.mixing` has the functions that check
what they get."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import check_finite, describe, look_finite
from hpkernels.ops.common.autograd import refuse_second_backward, refuse_transforms
from hpkernels.ops.local_mix import reference
from hpkernels.ops.local_mix.weighting import Weighting


def _check_attention_numbers(attention: Tensor) -> None:
    """NaN and +inf are errors on the CPU; -inf is an attention of zero."""
    if attention.device.type == "cpu" and attention.numel():
        largest = attention.amax()
        if not largest < torch.inf:
            raise ValueError(f"attention: expected logits without NaN or +inf, got {describe(attention)}")


def _checked(weights: Tensor, expected: str) -> Tensor:
    """NaN stands for logits that overflowed: an error on the CPU."""
    if weights.device.type == "cpu":
        tokens = int(weights.isnan().any(-1).sum())
        if tokens:
            raise ValueError(f"{expected} in {weights.dtype}, got NaN or infinity for {tokens} tokens")
    return weights


# Weighting, flat, as torch wants it.
_HOW = "SymInt height, SymInt width, float sigma, float low_quantile, float high_quantile"


@torch.library.custom_op(
    "hpkernels::neighbor_weights", mutates_args=(), schema=f"(Tensor attention, {_HOW}, str backend) -> Tensor"
)
def neighbor_weights(attention, *how_backend):
    *how, backend = how_backend
    _check_attention_numbers(attention)
    weights = dispatch.function("local_mix", "neighbor_weights", backend, attention)(attention, Weighting(*how))
    return _checked(weights, "attention: expected logits whose mean over the heads is finite")


@neighbor_weights.register_fake
def _(attention, height, width, *_):
    dtype = torch.float64 if attention.dtype == torch.float64 else torch.float32
    return torch.empty((attention.shape[0], height * width, 9), dtype=dtype, device=attention.device)


@torch.library.custom_op(
    "hpkernels::neighbor_weights_qk",
    mutates_args=(),
    schema=f"(Tensor queries, Tensor keys, float scale, {_HOW}, str backend) -> Tensor",
)
def neighbor_weights_qk(queries, keys, scale, *how_backend):
    *how, backend = how_backend
    check_finite("queries", queries)
    check_finite("keys", keys)
    weights = dispatch.function("local_mix", "neighbor_weights_qk", backend, queries)
    found = weights(queries, keys, scale, Weighting(*how))
    return _checked(found, f"queries: expected products with keys, times {scale}, that are finite")


@neighbor_weights_qk.register_fake
def _(queries, keys, scale, height, width, *_):
    dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
    return torch.empty((queries.shape[0], height * width, 9), dtype=dtype, device=queries.device)


def neighbor_mix(code: Tensor, weights: Tensor, height: int, width: int, backend: str) -> Tensor:
    """out_i = sum_n weights_i[n] code[i + n], differentiable in both; see `hpkernels.mixing`."""
    if backend == "reference":  # plain autograd, so that a second backward works
        look_finite("code", code)
        look_finite("weights", weights)
        return reference.neighbor_mix(code, weights, height, width)
    refuse_transforms(code, weights)
    return _neighbor_mix(code, weights, height, width, backend)


@torch.library.custom_op("hpkernels::neighbor_mix", mutates_args=())
def _neighbor_mix(code: Tensor, weights: Tensor, height: int, width: int, backend: str) -> Tensor:
    check_finite("code", code)
    check_finite("weights", weights)
    return dispatch.function("local_mix", "neighbor_mix", backend, code)(code, weights, height, width)


@_neighbor_mix.register_fake
def _(code, weights, height, width, backend):
    return torch.empty(code.shape, dtype=code.dtype, device=code.device)


@torch.library.custom_op("hpkernels::neighbor_mix_grad", mutates_args=())
def _neighbor_mix_grad(
    grad_out: Tensor,
    code: Tensor,
    weights: Tensor,
    height: int,
    width: int,
    need_code: bool,
    need_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad = dispatch.function("local_mix", "neighbor_mix_grad", backend, code)
    return grad(grad_out, code, weights, height, width, need_code, need_weights)


@_neighbor_mix_grad.register_fake
def _(grad_out, code, weights, height, width, need_code, need_weights, backend):
    grad_code = torch.empty(code.shape if need_code else (0,), dtype=code.dtype, device=code.device)
    grad_weights = torch.empty(weights.shape if need_weights else (0,), dtype=weights.dtype, device=code.device)
    return grad_code, grad_weights


refuse_second_backward(_neighbor_mix_grad)


def _setup(ctx, inputs, output):
    code, weights, ctx.height, ctx.width, ctx.backend = inputs
    ctx.save_for_backward(code, weights)


def _backward(ctx, grad_out):
    code, weights = ctx.saved_tensors
    need_code, need_weights = ctx.needs_input_grad[:2]
    grads = _neighbor_mix_grad(grad_out, code, weights, ctx.height, ctx.width, need_code, need_weights, ctx.backend)
    return (grads[0] if need_code else None, grads[1] if need_weights else None, None, None, None)


_neighbor_mix.register_autograd(_backward, setup_context=_setup)
