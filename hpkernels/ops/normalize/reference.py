"""Rows divided by their Euclidean norm, in plain torch (differentiable any number of times)."""

from __future__ import annotations

import torch
from torch import Tensor


def output_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays fp64; 16-bit inputs stay what they are on a GPU (its matrix units take them), else become fp32."""
    if x.dtype == torch.float64 or (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)):
        return x.dtype
    return torch.float32


def normalize_rows(x: Tensor, name: str = "x") -> Tensor:
    """x / ||x|| row by row; zero rows stay zero and get zero gradient. Arithmetic in fp32 (fp64 for fp64).

    The row is first divided by its largest magnitude (a constant: it cancels), so that squares neither overflow
    nor underflow.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype)
    scale = y.detach().abs().amax(-1, keepdim=True)
    y = y / torch.where(scale == 0, 1.0, scale)
    squares = (y * y).sum(-1, keepdim=True)
    y = y * torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).rsqrt())
    return y.to(output_dtype(x))


def normalize_rows_grad(grad_out: Tensor, x: Tensor) -> Tensor:
    """(g - <g, y> y) / ||x|| with y = x / ||x||; zero for zero rows."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, g = x.to(dtype), grad_out.to(dtype)
    scale = y.abs().amax(-1, keepdim=True)
    y = y / torch.where(scale == 0, 1.0, scale)
    norm = (y * y).sum(-1, keepdim=True).sqrt()
    inverse = torch.where(norm == 0, 0.0, 1.0 / torch.where(norm == 0, 1.0, norm))
    y = y * inverse
    grad = (g - (g * y).sum(-1, keepdim=True) * y) * inverse / torch.where(scale == 0, 1.0, scale)
    return grad.to(x.dtype)


def normalize_streams(*streams: Tensor) -> Tensor:
    """`normalize_rows` of tensors of one shape and dtype, behind one another (S, ...)."""
    return torch.stack([normalize_rows(x, "z") for x in streams])


def normalize_streams_grad(grad_out: Tensor, *streams: Tensor) -> list[Tensor]:
    """`normalize_rows_grad` of each, grad_out (S, ...)."""
    return [normalize_rows_grad(grad, x) for grad, x in zip(grad_out, streams)]
