"""The gradient of the sparse denominator: only listed columns are visited (`lists`).

dX_i collects the positives of both sides, the columns of M_i (the row side), and the rows whose M names i (the column
side). The last has no sharing between neighbouring i, so it goes through a workspace: for each t, products W_t^T X_t
give one row per (t, column), written behind one another in the order (column, t); then each column adds up its rows in
that order. The workspace is bounded: columns are taken in windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common.gpu import LOG2E, padded_rows
from hpkernels.ops.common.triton import on_device, popcount, precision, tile_product, transpose_bits
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.triton.lists import (
    NEGATIVE_ROWS,
    PANEL,
    Lists,
    bits_at,
    count_columns,
    list_rows,
    negative_lists,
    positive_lists,
    tile_columns,
)
from hpkernels.ops.contrastive.workspace import ColumnWindows

_COLUMN_SPLITS = 4  # programs that share one token position's columns in the column side
_SUM_PROGRAMS = 4096
_SUM_ROWS = 8  # workspace rows added at a time


@triton.jit
def _contrastive_listed_grad_kernel(
    x_ptr, positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
    starts_ptr, counts_ptr, columns_ptr, capacity,
    lse_ptr, grad_lse_ptr, grad_pos_ptr, grad_ext_ptr, out_scale_ptr, out_ptr, D_out, first_row, n, N, D, R, W,
    scale,
    NEGATIVES: tl.constexpr, ADD: tl.constexpr,
    SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i (+)= out_scale sum_{j in the list} w_ij x_j for BLOCK_R of the list's rows, one stream.

    NEGATIVES: w = grad_lse_i p_ij over M's columns. Else both sides of the positives:
    w = gp_i P_ij + gp_j P_ji + ge_i Q_ij + ge_j Q_ji + gl_i [P_ij, not M_ij] p_ij + gl_j [P_ji, not M_ji] p_ji.
    The output tile is transposed, [D, rows], so that x_j^T, the long side, leads the second product too.
    """
    item = tl.program_id(0)
    mask_rows = list_rows(item, tl.program_id(1), first_row, R, NEGATIVES, BLOCK_R)
    valid_mask_rows = tl.minimum(mask_rows, n - 1)
    rows, valid_rows = first_row + mask_rows, first_row + valid_mask_rows
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, count = tl.load(starts_ptr + item), tl.load(counts_ptr + item)
    fits = start + count <= capacity
    if RESIDENT:
        x_rows_at = valid_rows.to(tl.int64)[None, :] * D + d[:, None]
        x_rows = tl.load(x_ptr + x_rows_at)
    lse_i = tl.load(lse_ptr + valid_rows)[None, :]
    gl_i = tl.load(grad_lse_ptr + valid_rows)[None, :]
    gp_i = tl.load(grad_pos_ptr + valid_rows)[None, :]
    ge_i = tl.load(grad_ext_ptr + valid_rows)[None, :]
    acc = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    for tile in range(0, tl.cdiv(tl.where(fits, count, N), BLOCK_C)):
        cols, there = tile_columns(columns_ptr, start, count, fits, tile, N, BLOCK_C)
        x_cols_at = cols.to(tl.int64)[:, None] * D + d[None, :]
        x_cols = tl.load(x_ptr + x_cols_at)
        if RESIDENT:
            z = tl.dot(x_cols, x_rows, input_precision=PRECISION)
        else:
            z = tile_product(x_ptr, x_ptr, cols, valid_rows, D, D, D, BLOCK_C, BLOCK_R, BLOCK_K, PRECISION)
        z *= scale
        if NEGATIVES:
            inside = bits_at(negatives_ptr, item, cols, W)[:, None]
            weight = tl.where(inside, gl_i * tl.exp2(z - lse_i), 0.0)
        else:
            positive = bits_at(positives_ptr, valid_mask_rows[None, :], cols[:, None], W)
            positive_t = positive
            if not SYMMETRIC_POSITIVES:
                positive_t = bits_at(positives_t_ptr, valid_mask_rows[None, :], cols[:, None], W)
            inside, inside_t = positive, positive_t
            if HAS_NEGATIVES:
                inside &= bits_at(negatives_ptr, (valid_rows % R)[None, :], cols[:, None], W) == 0
                inside_t &= bits_at(negatives_ptr, (cols % R)[:, None], valid_rows[None, :], W) == 0
            lse_j = tl.load(lse_ptr + cols)[:, None]
            gl_j = tl.load(grad_lse_ptr + cols)[:, None]
            gp_j = tl.load(grad_pos_ptr + cols)[:, None]
            weight = tl.where(inside, gl_i * tl.exp2(z - lse_i), 0.0)
            weight += tl.where(inside_t, gl_j * tl.exp2(z - lse_j), 0.0)
            weight += tl.where(positive, gp_i, 0.0) + tl.where(positive_t, gp_j, 0.0)
            if HAS_EXTRA:
                ge_j = tl.load(grad_ext_ptr + cols)[:, None]
                also = bits_at(extra_ptr, valid_mask_rows[None, :], cols[:, None], W)
                also_t = also
                if not SYMMETRIC_EXTRA:
                    also_t = bits_at(extra_t_ptr, valid_mask_rows[None, :], cols[:, None], W)
                weight += tl.where(also, ge_i, 0.0) + tl.where(also_t, ge_j, 0.0)
        weight = tl.where((rows[None, :] != cols[:, None]) & there[:, None], weight, 0.0)
        acc = tl.dot(tl.trans(x_cols), weight.to(x_cols.dtype), acc, input_precision=PRECISION)
    out_at = mask_rows.to(tl.int64)[None, :] * D_out + d[:, None]
    mask = (mask_rows < n)[None, :] & (d < D_out)[:, None]
    acc *= tl.load(out_scale_ptr)
    if ADD:
        acc += tl.load(out_ptr + out_at, mask=mask, other=0.0)
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rank(bits_ptr, prefix_ptr, counts_ptr, row, column, columns, W):
    """Set bits of row `row` before column `column` (up to `columns`, the number of columns)."""
    before_end = column < columns
    at = row.to(tl.int64) * W + (column >> 5)
    word = tl.load(bits_ptr + at, mask=before_end, other=0)
    rank = tl.load(prefix_ptr + at, mask=before_end, other=0) + popcount(word & ((1 << (column & 31)) - 1))
    return tl.where(before_end, rank, tl.load(counts_ptr + row))


@triton.jit
def _contrastive_column_side_kernel(
    x_ptr, negatives_ptr, prefix_ptr, starts_ptr, counts_ptr, columns_ptr, capacity,
    turned_ptr, turned_prefix_ptr, turned_counts_ptr, turned_starts_ptr, window_ptr, workspace_ptr,
    lse_ptr, grad_lse_ptr, N, D, R, W, W_turned, scale,
    RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """workspace[slot(t, j)] = sum over the rows i of token position t of grad_lse_i p_ij x_i.

    For the window's columns j in M_t; slot counts the set bits (j, t) of the turned negatives from the window's first
    column on.
    """
    t = tl.program_id(0)
    first_column, last_column = tl.load(window_ptr), tl.load(window_ptr + 1)
    start, count = tl.load(starts_ptr + t), tl.load(counts_ptr + t)
    if (start + count <= capacity) & (first_column < last_column):
        origin = tl.load(turned_starts_ptr + first_column)
        first = _rank(negatives_ptr, prefix_ptr, counts_ptr, t, first_column, N, W)
        last = _rank(negatives_ptr, prefix_ptr, counts_ptr, t, last_column, N, W)
        d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        for tile in range(tl.program_id(1), tl.cdiv(last - first, BLOCK_C), tl.num_programs(1)):
            position = first + tile * BLOCK_C + tl.arange(0, BLOCK_C)
            there = position < last
            cols = tl.load(columns_ptr + start + position, mask=there, other=0)
            x_cols_at = cols.to(tl.int64)[:, None] * D + d[None, :]
            if RESIDENT:
                x_cols = tl.load(x_ptr + x_cols_at)
            acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
            for block in range(0, tl.cdiv(N // R, BLOCK_R)):
                rows = t + R * (block * BLOCK_R + tl.arange(0, BLOCK_R))
                valid_rows = tl.minimum(rows, N - 1)
                x_rows_at = valid_rows.to(tl.int64)[:, None] * D + d[None, :]
                x_rows = tl.load(x_ptr + x_rows_at)
                if RESIDENT:
                    z = tl.dot(x_cols, tl.trans(x_rows), input_precision=PRECISION)
                else:
                    z = tile_product(x_ptr, x_ptr, cols, valid_rows, D, D, D, BLOCK_C, BLOCK_R, BLOCK_K, PRECISION)
                lse_i = tl.load(lse_ptr + valid_rows)[None, :]
                gl_i = tl.load(grad_lse_ptr + valid_rows)[None, :]
                others = (rows < N)[None, :] & (rows[None, :] != cols[:, None])
                weight = tl.where(others, gl_i * tl.exp2(z * scale - lse_i), 0.0)
                acc = tl.dot(weight.to(x_rows.dtype), x_rows, acc, input_precision=PRECISION)
            rank = _rank(turned_ptr, turned_prefix_ptr, turned_counts_ptr, cols, t + tl.zeros_like(cols), R, W_turned)
            slot = tl.load(turned_starts_ptr + cols) - origin + rank
            out_at = slot[:, None] * D + d[None, :]
            tl.store(workspace_ptr + out_at, acc.to(workspace_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def _contrastive_column_sum_kernel(
    x_ptr, turned_ptr, turned_counts_ptr, turned_starts_ptr, starts_ptr, capacity, window_ptr, workspace_ptr,
    lse_ptr, grad_lse_ptr, partial_ptr, out_scale_ptr, out_ptr, D_out, first_row, N, D, R, W_turned, scale,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out_j = out_scale (partial_j + the column side of j) for the window's columns j.

    The column side is the sum of j's workspace rows, in order of t. Where the lists found no room there are none, and
    it is summed here from the bits: slow, exact.
    """
    first_column, last_column = tl.load(window_ptr), tl.load(window_ptr + 1)
    d = tl.arange(0, BLOCK_D)
    listed = tl.load(starts_ptr) <= capacity
    for column in range(first_column + tl.program_id(0), last_column, tl.num_programs(0)):
        j = tl.full([], 0, tl.int64) + column
        begin = tl.load(turned_starts_ptr + j) - tl.load(turned_starts_ptr + first_column)
        count = tl.where(listed, tl.load(turned_counts_ptr + j), 0)
        sums = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for s in range(0, count, BLOCK_S):
            slot = s + tl.arange(0, BLOCK_S)
            at = (begin + slot)[:, None] * D + d[None, :]
            mask = (slot < count)[:, None] & (d < D)[None, :]
            sums += tl.load(workspace_ptr + at, mask=mask, other=0.0).to(tl.float32)
        acc = tl.sum(sums, 0)
        if listed == 0:
            x_j = tl.load(x_ptr + j * D + d, mask=d < D, other=0.0).to(tl.float32)
            for t in range(0, R):
                word = tl.load(turned_ptr + j * W_turned + (t >> 5))
                if ((word >> (t & 31)) & 1) != 0:
                    for block in range(0, tl.cdiv(N // R, BLOCK_R)):
                        rows = t + R * (block * BLOCK_R + tl.arange(0, BLOCK_R))
                        others = (rows < N) & (rows != j)
                        valid_rows = tl.minimum(rows, N - 1)
                        at = valid_rows.to(tl.int64)[:, None] * D + d[None, :]
                        x_rows = tl.load(x_ptr + at, mask=(d < D)[None, :], other=0.0).to(tl.float32)
                        z = tl.sum(x_rows * x_j[None, :], 1) * scale
                        p = tl.load(grad_lse_ptr + valid_rows) * tl.exp2(z - tl.load(lse_ptr + valid_rows))
                        acc += tl.sum(tl.where(others, p, 0.0)[:, None] * x_rows, 0)
        acc += tl.load(partial_ptr + (j - first_row) * D + d, mask=d < D, other=0.0)
        out = (acc * tl.load(out_scale_ptr)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (j - first_row) * D_out + d, out, mask=d < D_out)


class _ColumnSide:
    """The transposed negatives with their running counts, and the windows of columns that share the workspace.

    Only the anchors' columns, `n` from `first_row` on, have slots in it.
    """

    def __init__(self, lists: Lists, negatives: Tensor, total: int, first_row: int, n: int, d: int, dtype: torch.dtype):
        period = negatives.shape[0]
        self.bits = transpose_bits(negatives, total)
        self.counts, self.prefix = count_columns([self.bits], 1, num_warps=1)
        self.counts[:first_row] = 0
        self.counts[first_row + n :] = 0
        windows = ColumnWindows(self.counts, first_row, n, period, lists.capacity, d * dtype.itemsize)
        self.starts, self.bounds, self.windows = windows.starts, windows.bounds, windows.number
        self.workspace = torch.empty((windows.rooms, d), dtype=dtype, device=negatives.device)


def grad(x: Tensor, masks: Masks, temperature: float, tables: list[Tensor], out_scale: Tensor) -> Tensor:
    """out_scale sum_j (G_ij + G_ji) x_j in x's dtype, stream by stream to bound the scratch.

    tables: lse in base 2 and the three row gradients, (S, N).
    """
    config = tuning.lookup("contrastive_grad_sparse", x.dtype, x.shape[2], x.shape[1], x.device)
    n, first_row, negatives = masks.anchors, masks.first_row, masks.negatives
    out = x.new_empty(x.shape[0], n, x.shape[2])
    x = padded_rows(x, config["BLOCK_D"])
    streams, total, d = x.shape
    period, width, bits = masks.period(total), masks.positives.stride(0), masks.filled()
    pieces = triton.cdiv(d, config["BLOCK_D"])
    scale = LOG2E / temperature
    options = dict(PRECISION=precision(x.dtype), **config)
    listed = dict(
        SYMMETRIC_POSITIVES=masks.positives_t is None, HAS_EXTRA=masks.extra is not None,
        SYMMETRIC_EXTRA=masks.extra_t is None, HAS_NEGATIVES=negatives is not None, **options,
    )  # fmt: skip
    of_positives = positive_lists(total, *masks[:4])
    if negatives is not None:
        of_negatives = negative_lists(negatives, total)
        side = _ColumnSide(of_negatives, negatives, total, first_row, n, d, x.dtype)
        partial = torch.empty((n, d), dtype=torch.float32, device=x.device)
        one = torch.ones_like(out_scale)
        blocks = triton.cdiv(triton.cdiv(n, period), NEGATIVE_ROWS)
    with on_device(x):
        for s in range(streams):
            vectors = [table[s] for table in tables]
            sizes = (first_row, n, total, d, period, width, scale)
            if negatives is None:
                _contrastive_listed_grad_kernel[(of_positives.number, 1, pieces)](
                    x[s], *bits, *of_positives.arguments(), *vectors, out_scale, out[s], out.shape[2], *sizes,
                    NEGATIVES=False, ADD=False, BLOCK_R=PANEL, **listed,
                )  # fmt: skip
                continue
            _contrastive_listed_grad_kernel[(of_positives.number, 1, pieces)](
                x[s], *bits, *of_positives.arguments(), *vectors, one, partial, d, *sizes,
                NEGATIVES=False, ADD=False, BLOCK_R=PANEL, **listed,
            )  # fmt: skip
            _contrastive_listed_grad_kernel[(of_negatives.number, blocks, pieces)](
                x[s], *bits, *of_negatives.arguments(), *vectors, one, partial, d, *sizes,
                NEGATIVES=True, ADD=True, BLOCK_R=NEGATIVE_ROWS, **listed,
            )  # fmt: skip
            for w in range(side.windows):
                window = side.bounds[w : w + 2]
                _contrastive_column_side_kernel[(period, _COLUMN_SPLITS, pieces)](
                    x[s], negatives, of_negatives.prefix, *of_negatives.arguments(),
                    side.bits, side.prefix, side.counts, side.starts, window, side.workspace,
                    *vectors[:2], total, d, period, width, side.bits.stride(0), scale,
                    BLOCK_R=NEGATIVE_ROWS, **options,
                )  # fmt: skip
                _contrastive_column_sum_kernel[(min(n, _SUM_PROGRAMS),)](
                    x[s], side.bits, side.counts, side.starts, of_negatives.starts, of_negatives.capacity,
                    window, side.workspace, *vectors[:2], partial, out_scale, out[s],
                    out.shape[2], first_row, total, d, period, side.bits.stride(0), scale,
                    BLOCK_D=triton.next_power_of_2(d), BLOCK_R=16, BLOCK_S=_SUM_ROWS, num_warps=2 if d <= 256 else 4,
                )  # fmt: skip
    return out
