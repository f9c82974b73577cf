"""Rows divided by their Euclidean norm, on `hpkernels._cuda`: arithmetic in fp32, rows summed in one fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import _cuda
from hpkernels.ops.common.cuda import SUFFIX, launch, require_supported, whole_chunks
from hpkernels.ops.common.gpu import common_dtype
from hpkernels.ops.normalize.reference import output_dtype


def normalize_rows(x: Tensor, name: str) -> Tensor:
    """x / ||x|| along the last axis; zero rows stay zero. fp32; 16-bit inputs on a GPU keep their dtype."""
    require_supported(**{name: x})
    return _by_rows("normalize_rows", x.to(output_dtype(x)))


def normalize_rows_grad(grad_out: Tensor, x: Tensor) -> Tensor:
    """(g - <g, y> y) / ||x|| with y = x / ||x||, in x's dtype; zero for zero rows."""
    require_supported(grad_out=grad_out, x=x)
    working = common_dtype(grad_out, x)
    return _by_rows("normalize_rows_grad", grad_out.to(working), x.to(working)).to(x.dtype)


def normalize_streams(*streams: Tensor) -> Tensor:
    """`normalize_rows` of tensors of one shape and dtype, behind one another (S, ...)."""
    return torch.stack([normalize_rows(x, "z") for x in streams])


def normalize_streams_grad(grad_out: Tensor, *streams: Tensor) -> list[Tensor]:
    """`normalize_rows_grad` of each, grad_out (S, ...)."""
    return [normalize_rows_grad(grad, x) for grad, x in zip(grad_out, streams)]


def _by_rows(function: str, *operands: Tensor) -> Tensor:
    """`function` of rows of one dtype; zeros that widen a row change neither norm nor products."""
    width = operands[0].shape[-1]
    operands = [whole_chunks(x) for x in operands]
    out = torch.empty_like(operands[0])
    if out.numel():
        padded = out.shape[-1]
        native = getattr(_cuda, f"{function}_{SUFFIX[out.dtype]}")
        pointers = (x.data_ptr() for x in operands)
        launch(native, out.device, *pointers, out.numel() // padded, padded, out.data_ptr())
    return out[..., :width].contiguous()
