"""The log-sum-exp over other groups and its gradient in Triton: masks are made of four bytes a row, tile by tile.

Rows and columns may be the same matrix or two. A row panel owns its sums and its gradient: no atomics. Logits are in
base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.gpu import LOG2E, padded_rows
from hpkernels.ops.common.triton import (
    merged_lse,
    on_device,
    precision,
    require_supported,
    same_dtype,
    split_tiles,
    tile_product,
)
from hpkernels.ops.group_lse.rows import Grouped
from hpkernels.tuning import dtype_class

_LSE_TILES = {
    "half": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "single": dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2),
}


@triton.jit
def _other_groups(group_ptr, column_group_ptr, valid_rows, cols, valid_cols, M):
    """int1 tile: both take part, and their groups differ. Symmetric in rows and columns."""
    groups = tl.load(group_ptr + valid_rows)
    column_groups = tl.where(cols < M, tl.load(column_group_ptr + valid_cols), -1)
    taking_part = (groups >= 0)[:, None] & (column_groups >= 0)[None, :]
    return taking_part & (groups[:, None] != column_groups[None, :])


@triton.jit
def _contrastive_group_lse_kernel(
    x_ptr, columns_ptr, group_ptr, column_group_ptr, total_ptr, shift_ptr, N, M, D, tiles_per_split, scale, fixed_shift,
    FIXED_SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row and split: sum_{j in E} exp2(z_ij - shift), and the shift."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_rows = tl.minimum(rows, N - 1)
    split = tl.program_id(1)
    total = tl.zeros([BLOCK_M], tl.float32)
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if FIXED_SHIFT:
        shift = tl.zeros([BLOCK_M], tl.float32) + fixed_shift
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(M, BLOCK_N))
    for tile in range(split * tiles_per_split, last):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_cols = tl.minimum(cols, M - 1)
        z = tile_product(x_ptr, columns_ptr, valid_rows, valid_cols, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        z *= scale
        inside = _other_groups(group_ptr, column_group_ptr, valid_rows, cols, valid_cols, M)
        if FIXED_SHIFT:
            total += tl.sum(tl.where(inside, tl.exp2(z - shift[:, None]), 0.0), 1)
        else:
            largest = tl.maximum(shift, tl.max(tl.where(inside, z, float("-inf")), 1))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp2(shift - base) + tl.sum(tl.where(inside, tl.exp2(z - base[:, None]), 0.0), 1)
            shift = largest
    at = split.to(tl.int64) * N + rows
    tl.store(total_ptr + at, total, mask=rows < N)
    tl.store(shift_ptr + at, shift, mask=rows < N)


@triton.jit
def _contrastive_group_grad_kernel(
    x_ptr, columns_ptr, group_ptr, column_group_ptr, lse_ptr, factor_ptr, column_lse_ptr, column_factor_ptr,
    out_scale_ptr, out_ptr, N, M, D, D_out, scale, shift,
    OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, SHARED_EXPONENTIAL: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = out_scale sum_j (OF_ROWS G_ij + OF_COLUMNS G_ji) column_j for a panel of rows and BLOCK_D of D.

    With SHARED_EXPONENTIAL a factor is grad_lse exp2(shift - lse); else it is grad_lse.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_rows = tl.minimum(rows, N - 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if RESIDENT:
        x_rows = tl.load(x_ptr + valid_rows.to(tl.int64)[:, None] * D + d[None, :])
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(0, tl.cdiv(M, BLOCK_N)):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_cols = tl.minimum(cols, M - 1)
        x_cols = tl.load(columns_ptr + valid_cols.to(tl.int64)[:, None] * D + d[None, :])
        if RESIDENT:
            z = tl.dot(x_rows, tl.trans(x_cols), input_precision=PRECISION)
        else:
            z = tile_product(x_ptr, columns_ptr, valid_rows, valid_cols, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        z *= scale
        weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if OF_ROWS:
            weight += tl.load(factor_ptr + valid_rows)[:, None] * (
                1.0 if SHARED_EXPONENTIAL else tl.exp2(z - tl.load(lse_ptr + valid_rows)[:, None])
            )
        if OF_COLUMNS:
            weight += tl.load(column_factor_ptr + valid_cols)[None, :] * (
                1.0 if SHARED_EXPONENTIAL else tl.exp2(z - tl.load(column_lse_ptr + valid_cols)[None, :])
            )
        if SHARED_EXPONENTIAL:
            weight *= tl.exp2(z - shift)
        inside = _other_groups(group_ptr, column_group_ptr, valid_rows, cols, valid_cols, M)
        weight = tl.where(inside, weight, 0.0)
        acc = tl.dot(weight.to(x_cols.dtype), x_cols, acc, input_precision=PRECISION)
    out = (acc * tl.load(out_scale_ptr)).to(out_ptr.dtype.element_ty)
    out_at = rows.to(tl.int64)[:, None] * D_out + d[None, :]
    tl.store(out_ptr + out_at, out, mask=(rows < N)[:, None] & (d < D_out)[None, :])


def _operands(rows: Grouped) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, groups, keys, key_groups = rows
    require_supported(x=x, keys=keys)
    groups = groups.to(torch.int32).contiguous()
    if keys is None:
        x = x.contiguous()
        return x, groups, x, groups
    x, keys = same_dtype(x, keys)
    return x, groups, keys, key_groups.to(torch.int32).contiguous()


def group_lse(rows: Grouped, temperature: float) -> Tensor:
    """(N,) fp32: log sum_{j in E_i} exp(<x_i, k_j> / temperature), 0 for an empty E_i; see reference.py."""
    x, groups, columns, column_groups = _operands(rows)
    n, m = x.shape[0], columns.shape[0]
    if n == 0 or m == 0:
        return torch.zeros(n, dtype=torch.float32, device=x.device)
    config = _LSE_TILES[dtype_class(x.dtype)]
    x, columns = (padded_rows(part, config["BLOCK_K"]) for part in (x, columns))
    panels = triton.cdiv(n, config["BLOCK_M"])
    splits, tiles_per_split = split_tiles(panels, triton.cdiv(m, config["BLOCK_N"]), x.device)
    totals, shifts = torch.empty((2, splits, n), dtype=torch.float32, device=x.device)
    with on_device(x):
        _contrastive_group_lse_kernel[(panels, splits)](
            x, columns, groups, column_groups, totals, shifts, n, m, x.shape[1], tiles_per_split,
            LOG2E / temperature, LOG2E / temperature, FIXED_SHIFT=common.has_fixed_shift(temperature),
            PRECISION=precision(x.dtype), **config,
        )  # fmt: skip
    return merged_lse(totals, shifts)


def group_lse_grad(rows: Grouped, temperature: float, lse: Tensor, grad_lse: Tensor, of_keys: bool) -> Tensor:
    """The gradient (N, D) of x or (M, D) of the keys, in its dtype, accumulated in fp32; see reference.py."""
    dtype, meets_itself = rows.keys.dtype if of_keys else rows.x.dtype, rows.keys is None
    x, groups, columns, column_groups = _operands(rows)
    if of_keys:
        x, groups, columns, column_groups = columns, column_groups, x, groups
    if x.shape[0] == 0 or columns.shape[0] == 0:
        return torch.zeros(x.shape, dtype=dtype, device=x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    (grad_lse,), out_scale = common.scaled_gradients(x.dtype, temperature, (grad_lse,))
    lse2 = (lse.float() * LOG2E).contiguous()
    shared, factor = common.shared_exponential(temperature, lse2, grad_lse)
    config = tuning.lookup("contrastive_grad_fused", x.dtype, x.shape[1], columns.shape[0], x.device)
    x, columns = (padded_rows(part, config["BLOCK_D"]) for part in (x, columns))
    grid = (triton.cdiv(x.shape[0], config["BLOCK_M"]), x.shape[1] // config["BLOCK_D"])
    with on_device(x):
        # lse and factor are the anchors': of the rows, of the columns, or of both. What a side lacks is never read.
        _contrastive_group_grad_kernel[grid](
            x, columns, groups, column_groups, lse2, factor, lse2, factor, out_scale, out,
            x.shape[0], columns.shape[0], x.shape[1], out.shape[1], LOG2E / temperature, LOG2E / temperature,
            OF_ROWS=not of_keys, OF_COLUMNS=of_keys or meets_itself, SHARED_EXPONENTIAL=shared,
            PRECISION=precision(x.dtype, full=True), **config,
        )  # fmt: skip
    return out
