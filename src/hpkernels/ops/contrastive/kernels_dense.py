"""The dense denominator: every tile of the pairs is swept; a row panel owns its statistics and its gradient.

Logits are kept in base 2, z_ij = l_ij log2(e), so that exponentials are one exp2. Masks are read as words and expanded
in registers. In the gradient the tile of x_j is loaded once for both products, z = x_i x_j^T and dX_i += (G + G^T) x_j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops._triton import (
    LN2,
    LOG2E,
    bit_tile,
    dtype_class,
    on_device,
    padded_rows,
    precision,
    split_tiles,
    tile_product,
)

_STATS = {
    "half": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "single": dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
}
# Key: dtype class, largest D. RESIDENT: the whole of x_i and of the tile of x_j is held, BLOCK_D wide. Else the grid's
# second axis walks the output in pieces of BLOCK_D, and the product z comes in steps of BLOCK_K.
_GRAD = {
    ("half", 64): dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=64, BLOCK_K=64, RESIDENT=True, num_warps=4, num_stages=3),
    ("half", 128): dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=128, BLOCK_K=64, RESIDENT=True, num_warps=4, num_stages=3),
    ("half", 256): dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=256, BLOCK_K=64, RESIDENT=True, num_warps=8, num_stages=2),
    ("half", 512): dict(BLOCK_M=64, BLOCK_N=32, BLOCK_D=512, BLOCK_K=64, RESIDENT=True, num_warps=8, num_stages=2),
    ("half", None): dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=256, BLOCK_K=64, RESIDENT=False, num_warps=8, num_stages=2),
    ("single", None): dict(BLOCK_M=64, BLOCK_N=32, BLOCK_D=256, BLOCK_K=16, RESIDENT=False, num_warps=8, num_stages=1),
}


def grad_config(table: dict, dtype: torch.dtype, d: int) -> dict:
    """The first entry of the dtype's class that is wide enough."""
    kind = dtype_class(dtype)
    return next(config for (k, widest), config in table.items() if k == kind and (widest is None or d <= widest))


@triton.jit
def _contrastive_stats_kernel(
    x_ptr, positives_ptr, extra_ptr, negatives_ptr, total_ptr, shift_ptr, pos_ptr, ext_ptr,
    N, D, R, W, tiles_per_split, scale, fixed_shift,
    ALL: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_NEGATIVES: tl.constexpr, FIXED_SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row and split: sum_{j in E} exp2(z_ij - shift), the shift, sum_j P_ij l_ij and sum_j Q_ij l_ij."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    stream = tl.program_id(2)
    x_ptr += stream.to(tl.int64) * N * D
    valid_rows = tl.minimum(rows, N - 1)
    total = tl.zeros([BLOCK_M], tl.float32)
    pos = tl.zeros([BLOCK_M], tl.float32)
    ext = tl.zeros([BLOCK_M], tl.float32)
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if FIXED_SHIFT:
        shift = tl.zeros([BLOCK_M], tl.float32) + fixed_shift
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(N, BLOCK_N))
    for tile in range(split * tiles_per_split, last):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z = tile_product(
            x_ptr, x_ptr, valid_rows, tl.minimum(cols, N - 1), D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        z *= scale
        others = (rows[:, None] != cols[None, :]) & (cols < N)[None, :]
        first_word = tile * (BLOCK_N // 32)
        positive = bit_tile(positives_ptr, valid_rows, first_word, W, BLOCK_M, BLOCK_N) & others
        inside = positive
        if ALL:
            inside = others
        if HAS_NEGATIVES:
            inside |= bit_tile(negatives_ptr, valid_rows % R, first_word, W, BLOCK_M, BLOCK_N) & others
        if FIXED_SHIFT:
            total += tl.sum(tl.where(inside, tl.exp2(z - shift[:, None]), 0.0), 1)
        else:
            largest = tl.maximum(shift, tl.max(tl.where(inside, z, float("-inf")), 1))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp2(shift - base) + tl.sum(tl.where(inside, tl.exp2(z - base[:, None]), 0.0), 1)
            shift = largest
        pos += tl.sum(tl.where(positive, z, 0.0), 1)
        if HAS_EXTRA:
            also = bit_tile(extra_ptr, valid_rows, first_word, W, BLOCK_M, BLOCK_N) & others
            ext += tl.sum(tl.where(also, z, 0.0), 1)
    at = (split.to(tl.int64) * tl.num_programs(2) + stream) * N + rows
    tl.store(total_ptr + at, total, mask=rows < N)
    tl.store(shift_ptr + at, shift, mask=rows < N)
    tl.store(pos_ptr + at, pos * LN2, mask=rows < N)
    tl.store(ext_ptr + at, ext * LN2, mask=rows < N)


def stats(
    x: Tensor, positives: Tensor, extra: Tensor | None, negatives: Tensor | None,
    everything: bool, temperature: float, fixed_shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Parts (splits, S, N) of the sums of exponentials, their base-2 shifts, and of the two logit sums."""
    config = _STATS[dtype_class(x.dtype)]
    x = padded_rows(x, config["BLOCK_K"])
    streams, n, d = x.shape
    panels = triton.cdiv(n, config["BLOCK_M"])
    splits, tiles_per_split = split_tiles(panels * streams, triton.cdiv(n, config["BLOCK_N"]), x.device)
    parts = torch.empty((4, splits, streams, n), dtype=torch.float32, device=x.device)
    with on_device(x):
        _contrastive_stats_kernel[(panels, splits, streams)](
            x, positives, positives if extra is None else extra, positives if negatives is None else negatives, *parts,
            n, d, n if negatives is None else negatives.shape[0], positives.stride(0), tiles_per_split,
            LOG2E / temperature, LOG2E / temperature,
            ALL=everything, HAS_EXTRA=extra is not None, HAS_NEGATIVES=negatives is not None, FIXED_SHIFT=fixed_shift,
            PRECISION=precision(x.dtype), **config,
        )  # fmt: skip
    return tuple(parts)


@triton.jit
def _contrastive_grad_kernel(
    x_ptr, positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
    lse_ptr, grad_lse_ptr, grad_pos_ptr, grad_ext_ptr, out_scale_ptr, out_ptr,
    N, D, D_out, R, W, scale,
    ALL: tl.constexpr, SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = out_scale sum_j (G_ij + G_ji) x_j for a panel of BLOCK_M rows and BLOCK_D columns of x."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    stream = tl.program_id(2)
    x_ptr += stream.to(tl.int64) * N * D
    lse_ptr += stream * N
    grad_lse_ptr += stream * N
    grad_pos_ptr += stream * N
    grad_ext_ptr += stream * N
    valid_rows = tl.minimum(rows, N - 1)
    x_rows_at = valid_rows.to(tl.int64)[:, None] * D + d[None, :]
    if RESIDENT:
        x_rows = tl.load(x_ptr + x_rows_at)
    lse_i = tl.load(lse_ptr + valid_rows)[:, None]
    gl_i = tl.load(grad_lse_ptr + valid_rows)[:, None]
    gp_i = tl.load(grad_pos_ptr + valid_rows)[:, None]
    ge_i = tl.load(grad_ext_ptr + valid_rows)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(0, tl.cdiv(N, BLOCK_N)):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_cols = tl.minimum(cols, N - 1)
        x_cols = tl.load(x_ptr + valid_cols.to(tl.int64)[:, None] * D + d[None, :])
        if RESIDENT:
            z = tl.dot(x_rows, tl.trans(x_cols), input_precision=PRECISION)
        else:
            z = tile_product(
                x_ptr, x_ptr, valid_rows, valid_cols, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
        z *= scale
        others = (rows[:, None] != cols[None, :]) & (cols < N)[None, :]
        first_word = tile * (BLOCK_N // 32)
        lse_j = tl.load(lse_ptr + valid_cols)[None, :]
        gl_j = tl.load(grad_lse_ptr + valid_cols)[None, :]
        gp_j = tl.load(grad_pos_ptr + valid_cols)[None, :]

        positive = bit_tile(positives_ptr, valid_rows, first_word, W, BLOCK_M, BLOCK_N)
        positive_t = positive
        if not SYMMETRIC_POSITIVES:
            positive_t = bit_tile(positives_t_ptr, valid_rows, first_word, W, BLOCK_M, BLOCK_N)
        inside, inside_t = positive, positive_t
        if HAS_NEGATIVES:
            inside |= bit_tile(negatives_ptr, valid_rows % R, first_word, W, BLOCK_M, BLOCK_N)
            first_row_word = tl.program_id(0) * (BLOCK_M // 32)
            inside_t |= tl.trans(bit_tile(negatives_ptr, valid_cols % R, first_row_word, W, BLOCK_N, BLOCK_M))
        row_part = gl_i * tl.exp2(z - lse_i)
        column_part = gl_j * tl.exp2(z - lse_j)
        if ALL:
            weight = row_part + column_part
        else:
            weight = tl.where(inside, row_part, 0.0) + tl.where(inside_t, column_part, 0.0)
        weight += tl.where(positive, gp_i, 0.0) + tl.where(positive_t, gp_j, 0.0)
        if HAS_EXTRA:
            ge_j = tl.load(grad_ext_ptr + valid_cols)[None, :]
            also = bit_tile(extra_ptr, valid_rows, first_word, W, BLOCK_M, BLOCK_N)
            also_t = also
            if not SYMMETRIC_EXTRA:
                also_t = bit_tile(extra_t_ptr, valid_rows, first_word, W, BLOCK_M, BLOCK_N)
            weight += tl.where(also, ge_i, 0.0) + tl.where(also_t, ge_j, 0.0)
        weight = tl.where(others, weight, 0.0)
        acc = tl.dot(weight.to(x_cols.dtype), x_cols, acc, input_precision=PRECISION)
    out_at = (stream.to(tl.int64) * N + rows)[:, None] * D_out + d[None, :]
    out = (acc * tl.load(out_scale_ptr)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at, out, mask=(rows < N)[:, None] & (d < D_out)[None, :])


def grad(
    x: Tensor, positives: Tensor, positives_t: Tensor | None, extra: Tensor | None, extra_t: Tensor | None,
    negatives: Tensor | None, everything: bool, temperature: float,
    lse2: Tensor, grad_lse: Tensor, grad_pos: Tensor, grad_ext: Tensor, out_scale: Tensor,
) -> Tensor:  # fmt: skip
    """out_scale sum_j (G_ij + G_ji) x_j in x's dtype; lse2 is the log-sum-exp in base 2."""
    config = grad_config(_GRAD, x.dtype, x.shape[2])
    out = torch.empty_like(x)
    x = padded_rows(x, config["BLOCK_D"])
    streams, n, d = x.shape
    masks = [positives if mask is None else mask for mask in (positives, positives_t, extra, extra_t, negatives)]
    grid = (triton.cdiv(n, config["BLOCK_M"]), triton.cdiv(d, config["BLOCK_D"]), streams)
    with on_device(x):
        _contrastive_grad_kernel[grid](
            x, *masks, lse2, grad_lse, grad_pos, grad_ext, out_scale, out,
            n, d, out.shape[2], n if negatives is None else negatives.shape[0], positives.stride(0),
            LOG2E / temperature,
            ALL=everything, SYMMETRIC_POSITIVES=positives_t is None,
            HAS_EXTRA=extra is not None, SYMMETRIC_EXTRA=extra_t is None, HAS_NEGATIVES=negatives is not None,
            PRECISION=precision(x.dtype),
            **config,
        )  # fmt: skip
    return out
