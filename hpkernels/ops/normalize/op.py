"""Row normalisation as a torch op: one pass forward, one backward, and the place where bad numbers are named."""

from __future__ import annotations

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


def _setup(ctx, inputs, output):
    x, _, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_out):
    (x,) = ctx.saved_tensors
    return _normalize_rows_grad(grad_out, x, ctx.backend), None, None


_normalize_rows.register_autograd(_backward, setup_context=_setup)
refuse_second_backward(_normalize_rows_grad)
