"""Row normalisation as a torch op: one pass forward, one backward, and the place where bad numbers are named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import check_finite, look_finite
from hpkernels.ops.common.autograd import refuse_second_backward, refuse_transforms
from hpkernels.ops.normalize import reference


def normalize_rows(x: Tensor, name: str, backend: str) -> Tensor:
    """Rows of x (..., D) divided by their norm, fp32 (fp64 for fp64; 16-bit kept on GPUs). Zero rows stay zero.

    `name` is the caller's argument name: non-finite input raises ValueError with it (CPU, or HPKERNELS_CHECK=1).
    """
    if backend == "reference":  # plain autograd, so that a second backward works
        look_finite(name, x)
        return reference.normalize_rows(x, name)
    refuse_transforms(x)
    return _normalize_rows(x, name, backend)


@torch.library.custom_op("hpkernels::normalize_rows", mutates_args=())
def _normalize_rows(x: Tensor, name: str, backend: str) -> Tensor:
    if backend != "cpu":  # the C++ kernel looks at every number anyway
        check_finite(name, x)
    return dispatch.function("normalize", "normalize_rows", backend, x)(x, name)


@_normalize_rows.register_fake
def _(x, name, backend):
    return torch.empty(x.shape, dtype=reference.output_dtype(x), device=x.device)


@torch.library.custom_op("hpkernels::normalize_rows_grad", mutates_args=())
def _normalize_rows_grad(grad_out: Tensor, x: Tensor, backend: str) -> Tensor:
    return dispatch.function("normalize", "normalize_rows_grad", backend, x)(grad_out, x)


@_normalize_rows_grad.register_fake
def _(grad_out, x, backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("hpkernels::normalize_streams", mutates_args=())
def _normalize_streams(streams: Sequence[Tensor], names: str, backend: str) -> Tensor:
    for name, x in zip(names.split(), streams, strict=True):
        check_finite(name, x)
    return dispatch.function("normalize", "normalize_streams", backend, streams[0])(*streams)


@_normalize_streams.register_fake
def _(streams, names, backend):
    x = streams[0]
    return torch.empty((len(streams), *x.shape), dtype=reference.output_dtype(x), device=x.device)


@torch.library.custom_op("hpkernels::normalize_streams_grad", mutates_args=())
def _normalize_streams_grad(grad_out: Tensor, streams: Sequence[Tensor], backend: str) -> list[Tensor]:
    return dispatch.function("normalize", "normalize_streams_grad", backend, streams[0])(grad_out, *streams)


@_normalize_streams_grad.register_fake
def _(grad_out, streams, backend):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in streams]


def normalize_streams(streams: list[Tensor], names: tuple[str, ...], backend: str) -> Tensor:
    """`normalize_rows` of tensors of one shape and dtype, behind one another (S, N, D)."""
    if backend == "reference":
        return torch.stack([normalize_rows(x, name, backend) for x, name in zip(streams, names)])
    refuse_transforms(*streams)
    return _normalize_streams(streams, " ".join(names), backend)


def _setup_streams(ctx, inputs, output):
    streams, _, ctx.backend = inputs
    ctx.save_for_backward(*streams)


def _backward_streams(ctx, grad_out):
    return _normalize_streams_grad(grad_out, ctx.saved_tensors, ctx.backend), None, None


_normalize_streams.register_autograd(_backward_streams, setup_context=_setup_streams)
refuse_second_backward(_normalize_streams_grad)


def _setup(ctx, inputs, output):
    x, _, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_out):
    (x,) = ctx.saved_tensors
    return _normalize_rows_grad(grad_out, x, ctx.backend), None, None


_normalize_rows.register_autograd(_backward, setup_context=_setup)
refuse_second_backward(_normalize_rows_grad)
