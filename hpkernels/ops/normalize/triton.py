"""Rows divided by their Euclidean norm, in Triton: a block of whole rows a program, arithmetic in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.triton import on_device, require_supported

_BLOCK_NUMBERS = 4096  # numbers a program holds: rows a program = this over the padded width
_WARPS = 4


@triton.jit
def _unit_rows(x):
    """y = x / ||x|| and 1 / ||x|| as two factors (their product may overflow), all zero for zero rows.

    Dividing by the largest magnitude first keeps the squares of 1e30 and of 1e-30 in range. A NaN or inf makes its
    whole row NaN: tl.max passes over NaN, the sum of squares does not.
    """
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest == 0.0, 1.0, largest)
    y = x / scale[:, None]
    squares = tl.sum(y * y, 1)
    inverse = tl.where(squares == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(squares == 0.0, 1.0, squares)))
    return y * inverse[:, None], inverse, scale


@triton.jit
def _normalize_rows_kernel(first_ptr, second_ptr, out_ptr, N, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """out_i = x_i / ||x_i||, of the first stream and of the second behind it."""
    x_ptr = tl.where(tl.program_id(1) == 0, first_ptr, second_ptr)
    out_ptr += tl.program_id(1).to(tl.int64) * N * D
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (d < D)[None, :]
    at = rows[:, None] * D + d[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y, _, _ = _unit_rows(x)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normalize_rows_grad_kernel(
    grad_ptr, first_ptr, second_ptr, first_out_ptr, second_out_ptr, N, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out_i = (g_i - <g_i, y_i> y_i) / ||x_i||, of the first stream and of the second, whose g lie behind."""
    x_ptr = tl.where(tl.program_id(1) == 0, first_ptr, second_ptr)
    out_ptr = tl.where(tl.program_id(1) == 0, first_out_ptr, second_out_ptr)
    grad_ptr += tl.program_id(1).to(tl.int64) * N * D
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (d < D)[None, :]
    at = rows[:, None] * D + d[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y, inverse, scale = _unit_rows(x)
    tangent = g - tl.sum(g * y, 1)[:, None] * y
    tl.store(out_ptr + at, (tangent * inverse[:, None] / scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def _layout(x: Tensor, streams: int, tables: int = 1) -> tuple[int, int, tuple[int, int], dict[str, int]]:
    """Rows, width, grid and block sizes for `streams` tensors as x (..., D), of which so many tables are held."""
    d = x.shape[-1]
    n = x.numel() // max(d, 1)
    block_d = triton.next_power_of_2(max(d, 16))
    block_m = max(1, _BLOCK_NUMBERS // (block_d * tables))
    return n, d, (triton.cdiv(n, block_m), streams), dict(BLOCK_M=block_m, BLOCK_D=block_d, num_warps=_WARPS)


def _output_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_cuda else torch.float32


def normalize_rows(x: Tensor, name: str) -> Tensor:
    """x / ||x|| along the last axis; zero rows stay zero. fp32; 16-bit inputs on a GPU keep their dtype."""
    require_supported(**{name: x})
    return normalize_streams(x)[0]


def normalize_rows_grad(grad_out: Tensor, x: Tensor) -> Tensor:
    """(g - <g, y> y) / ||x|| with y = x / ||x||, in x's dtype; zero for zero rows."""
    require_supported(grad_out=grad_out, x=x)
    return normalize_streams_grad(grad_out[None], x)[0]


def normalize_streams(*streams: Tensor) -> Tensor:
    """`normalize_rows` of one or two tensors of one shape and dtype, behind one another (S, ...)."""
    streams = [x.contiguous() for x in streams]
    first, last = streams[0], streams[-1]
    require_supported(z=first)
    out = torch.empty((len(streams), *first.shape), dtype=_output_dtype(first), device=first.device)
    if out.numel():
        n, d, grid, blocks = _layout(first, len(streams))
        with on_device(first):
            _normalize_rows_kernel[grid](first, last, out, n, d, **blocks)
    return out


def normalize_streams_grad(grad_out: Tensor, *streams: Tensor) -> list[Tensor]:
    """`normalize_rows_grad` of each, grad_out (S, ...)."""
    grad_out, streams = grad_out.contiguous(), [x.contiguous() for x in streams]
    out = [torch.empty_like(x) for x in streams]
    if grad_out.numel():
        n, d, grid, blocks = _layout(streams[0], len(streams), tables=2)
        with on_device(grad_out):
            _normalize_rows_grad_kernel[grid](grad_out, streams[0], streams[-1], out[0], out[-1], n, d, **blocks)
    return out
