"""The sparse denominator: only listed columns are visited.

Two families of lists, built on the device from the bits, without synchronisation:

    negatives   list t: the columns of row t of M, shared by the rows t, t + R, t + 2R, ... (one token position of all
                images): a small dense product of those rows with the gathered columns
    positives   list p: the columns where any of 16 consecutive rows has a P or Q bit

so E = M and "P without M" are summed apart. Lists lie one behind another in an array of fixed capacity, each padded to
whole tiles. A list that finds no room is walked as "every column" instead: the bits decide anyway, so the result is the
same and only time is lost.

Gradient: dX_i collects the positives of both sides, the columns of M_i (the row side), and the rows whose M names i
(the column side). The last has no sharing between neighbouring i, so it goes through a workspace: for each t, products
W_t^T X_t give one row per (t, column), written behind one another in the order (column, t); then each column adds up
its rows in that order. The workspace is bounded: columns are taken in windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.triton import (
    LN2,
    LOG2E,
    on_device,
    padded_rows,
    popcount,
    precision,
    tile_product,
    transpose_bits,
)
from hpkernels.ops.contrastive.masks import Masks

_PANEL = 16  # rows that share a list of positives
_LIST_MULTIPLE = 64  # lists are padded to whole tiles: every BLOCK_C divides it
_LIST_SHARE = (5, 32)  # capacity of the lists as a share of all pairs (negatives) or all panels x columns (positives)
_SCAN_WORDS = 64
_NEGATIVE_ROWS = 32  # rows of one token position a program takes
_COLUMN_SPLITS = 4  # programs that share one token position's columns in the column side
_SUM_PROGRAMS = 4096
_SUM_ROWS = 8  # workspace rows added at a time


# ------------------------------------------------------------------ lists


@triton.jit
def _union_words(a_ptr, b_ptr, c_ptr, d_ptr, first_row, rows, last_row, W, word, MASKS: tl.constexpr):
    """OR of words `word` over `rows` rows of up to four masks."""
    union = tl.zeros(word.shape, tl.int32)
    for r in range(rows):
        at = tl.minimum(first_row + r, last_row).to(tl.int64) * W + word
        union |= tl.load(a_ptr + at, mask=word < W, other=0)
        if MASKS > 1:
            union |= tl.load(b_ptr + at, mask=word < W, other=0)
        if MASKS > 2:
            union |= tl.load(c_ptr + at, mask=word < W, other=0)
        if MASKS > 3:
            union |= tl.load(d_ptr + at, mask=word < W, other=0)
    return union


@triton.jit
def _contrastive_count_columns_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, counts_ptr, prefix_ptr, rows, last_row, W,
    MASKS: tl.constexpr, STORE_PREFIX: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """counts[list] = set bits of the union; prefix[list, word] = set bits before the word."""
    item = tl.program_id(0)
    count = 0
    for start in range(0, W, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        bits = popcount(_union_words(a_ptr, b_ptr, c_ptr, d_ptr, item * rows, rows, last_row, W, word, MASKS))
        if STORE_PREFIX:
            before = count + tl.cumsum(bits, 0) - bits
            tl.store(prefix_ptr + item.to(tl.int64) * W + word, before, mask=word < W)
        count += tl.sum(bits, 0)
    tl.store(counts_ptr + item, count)


@triton.jit
def _contrastive_fill_columns_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, starts_ptr, counts_ptr, columns_ptr, rows, last_row, W, capacity,
    MASKS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Writes the list's columns in ascending order at its start, if it fits."""
    item = tl.program_id(0)
    start = tl.load(starts_ptr + item)
    if start + tl.load(counts_ptr + item) <= capacity:
        count = 0
        for first in range(0, W, BLOCK_W):
            word = first + tl.arange(0, BLOCK_W)
            union = _union_words(a_ptr, b_ptr, c_ptr, d_ptr, item * rows, rows, last_row, W, word, MASKS)
            bits = popcount(union)
            before = count + tl.cumsum(bits, 0) - bits
            lane = tl.arange(0, 32)[None, :]
            rank = before[:, None] + popcount(union[:, None] & ((1 << lane) - 1))
            chosen = ((union[:, None] >> lane) & 1) != 0
            tl.store(columns_ptr + start + rank, word[:, None] * 32 + lane, mask=chosen)
            count += tl.sum(bits, 0)


class _Lists:
    """Column lists: list n has counts[n] columns from starts[n] on (int64), if starts[n] + counts[n] <= capacity."""

    def __init__(self, masks: list[Tensor], n: int, rows: int, share_room: bool):
        """One list for each `rows` rows. Without share_room no list counts as fitting unless all do."""
        distinct = list({mask.data_ptr(): mask for mask in masks}.values())
        mask = distinct[0]
        total_rows, width = mask.shape
        self.number = triton.cdiv(total_rows, rows)
        columns = triton.cdiv(n * _LIST_SHARE[0], _LIST_SHARE[1])
        self.capacity = self.number * (triton.cdiv(columns, _LIST_MULTIPLE) + 1) * _LIST_MULTIPLE
        self.counts = torch.empty(self.number, dtype=torch.int32, device=mask.device)
        self.prefix = torch.empty((total_rows, width) if rows == 1 else 0, dtype=torch.int32, device=mask.device)
        four = (distinct + [mask] * 4)[:4]
        with on_device(mask):
            _contrastive_count_columns_kernel[(self.number,)](
                *four, self.counts, self.prefix, rows, total_rows - 1, width,
                MASKS=len(distinct), STORE_PREFIX=rows == 1, BLOCK_W=_SCAN_WORDS, num_warps=2,
            )  # fmt: skip
        padded = (self.counts + (_LIST_MULTIPLE - 1)) // _LIST_MULTIPLE * _LIST_MULTIPLE
        ends = padded.cumsum(0, dtype=torch.int64)
        self.starts = ends - padded
        if not share_room:
            self.starts = torch.where(ends[-1] <= self.capacity, self.starts, self.capacity + 1)
        self.columns = torch.empty(self.capacity, dtype=torch.int32, device=mask.device)
        with on_device(mask):
            _contrastive_fill_columns_kernel[(self.number,)](
                *four, self.starts, self.counts, self.columns, rows, total_rows - 1, width, self.capacity,
                MASKS=len(distinct), BLOCK_W=_SCAN_WORDS, num_warps=2,
            )  # fmt: skip

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.starts, self.counts, self.columns, self.capacity


def _positive_lists(n: int, *masks: Tensor | None) -> _Lists:
    return _Lists([mask for mask in masks if mask is not None], n, _PANEL, share_room=True)


def _negative_lists(negatives: Tensor, n: int) -> _Lists:
    return _Lists([negatives], n, 1, share_room=False)


@triton.jit
def _tile_columns(columns_ptr, start, count, fits, tile, N, BLOCK: tl.constexpr):
    """Columns of tile `tile` of a list, and which of them are there; of all columns where the list found no room."""
    slot = tile * BLOCK + tl.arange(0, BLOCK)
    there = slot < tl.where(fits, count, N)
    listed = tl.load(columns_ptr + start + slot, mask=slot < tl.where(fits, count, 0), other=0)
    return tl.where(there, tl.where(fits, listed, slot), 0), there


@triton.jit
def _bits_at(bits_ptr, rows, cols, stride):
    """int1: bit (rows, cols), index tensors that broadcast."""
    return ((tl.load(bits_ptr + rows.to(tl.int64) * stride + (cols >> 5)) >> (cols & 31)) & 1) != 0


@triton.jit
def _list_rows(item, block, first_row, R, NEGATIVES: tl.constexpr, BLOCK_R: tl.constexpr):
    """The rows of the masks (anchor = first_row + row) that share list `item`."""
    if NEGATIVES:
        rows = (item + R - first_row % R) % R + R * (block * BLOCK_R + tl.arange(0, BLOCK_R))
    else:
        rows = item * BLOCK_R + tl.arange(0, BLOCK_R)
    return rows


# ------------------------------------------------------------------ statistics


@triton.jit
def _contrastive_listed_stats_kernel(
    x_ptr, positives_ptr, extra_ptr, negatives_ptr, starts_ptr, counts_ptr, columns_ptr, capacity,
    total_ptr, shift_ptr, pos_ptr, ext_ptr, first_row, n, N, D, R, W, scale, fixed_shift,
    NEGATIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_NEGATIVES: tl.constexpr, FIXED_SHIFT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over one list for BLOCK_R of its rows: of M's columns (NEGATIVES), or of the positives, without M's in E.

    Tiles are [columns, rows], so that the gathered columns are the long side of the matrix product.
    """
    item = tl.program_id(0)
    stream = tl.program_id(2)
    x_ptr += stream.to(tl.int64) * N * D
    mask_rows = _list_rows(item, tl.program_id(1), first_row, R, NEGATIVES, BLOCK_R)
    valid_mask_rows = tl.minimum(mask_rows, n - 1)
    rows, valid_rows = first_row + mask_rows, first_row + valid_mask_rows
    start, count = tl.load(starts_ptr + item), tl.load(counts_ptr + item)
    fits = start + count <= capacity
    total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    pos = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    ext = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    shift = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if FIXED_SHIFT:
        shift = tl.zeros([BLOCK_R], tl.float32) + fixed_shift
    for tile in range(0, tl.cdiv(tl.where(fits, count, N), BLOCK_C)):
        cols, there = _tile_columns(columns_ptr, start, count, fits, tile, N, BLOCK_C)
        z = tile_product(x_ptr, x_ptr, cols, valid_rows, D, D, D, BLOCK_C, BLOCK_R, BLOCK_K, PRECISION)
        z *= scale
        others = (rows[None, :] != cols[:, None]) & there[:, None]
        if NEGATIVES:
            inside = others & _bits_at(negatives_ptr, item, cols, W)[:, None]
        else:
            positive = others & _bits_at(positives_ptr, valid_mask_rows[None, :], cols[:, None], W)
            pos += tl.where(positive, z, 0.0)
            inside = positive
            if HAS_NEGATIVES:
                inside = positive & (_bits_at(negatives_ptr, (valid_rows % R)[None, :], cols[:, None], W) == 0)
            if HAS_EXTRA:
                ext += tl.where(others & _bits_at(extra_ptr, valid_mask_rows[None, :], cols[:, None], W), z, 0.0)
        if FIXED_SHIFT:
            total += tl.where(inside, tl.exp2(z - shift[None, :]), 0.0)
        else:
            largest = tl.maximum(shift, tl.max(tl.where(inside, z, float("-inf")), 0))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp2(shift - base)[None, :] + tl.where(inside, tl.exp2(z - base[None, :]), 0.0)
            shift = largest
    at = stream.to(tl.int64) * n + mask_rows
    tl.store(total_ptr + at, tl.sum(total, 0), mask=mask_rows < n)
    tl.store(shift_ptr + at, shift, mask=mask_rows < n)
    tl.store(pos_ptr + at, tl.sum(pos, 0) * LN2, mask=mask_rows < n)
    tl.store(ext_ptr + at, tl.sum(ext, 0) * LN2, mask=mask_rows < n)


def stats(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (1 or 2, S, n): over the positives without M's columns and, with negatives, over M's columns."""
    config = tuning.lookup("contrastive_stats_sparse", x.dtype, x.shape[2], x.shape[1], x.device)
    x = padded_rows(x, config["BLOCK_K"])
    streams, total, d = x.shape
    n, period = masks.anchors, masks.period(total)
    positives, _, extra, _, negatives = masks.filled()
    families = [(False, _positive_lists(total, masks.positives, masks.extra), _PANEL, 1)]
    if masks.negatives is not None:
        blocks = triton.cdiv(triton.cdiv(n, period), _NEGATIVE_ROWS)
        families.append((True, _negative_lists(masks.negatives, total), _NEGATIVE_ROWS, blocks))
    parts = torch.empty((4, len(families), streams, n), dtype=torch.float32, device=x.device)
    with on_device(x):
        for part, (of_negatives, lists, rows, blocks) in enumerate(families):
            _contrastive_listed_stats_kernel[(lists.number, blocks, streams)](
                x, positives, extra, negatives, *lists.arguments(), *parts[:, part],
                masks.first_row, n, total, d, period, positives.stride(0), LOG2E / temperature, LOG2E / temperature,
                NEGATIVES=of_negatives, HAS_EXTRA=masks.extra is not None, HAS_NEGATIVES=masks.negatives is not None,
                FIXED_SHIFT=common.has_fixed_shift(temperature), BLOCK_R=rows,
                PRECISION=precision(x.dtype), **config,
            )  # fmt: skip
    return tuple(parts)


# ------------------------------------------------------------------ gradient


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
    mask_rows = _list_rows(item, tl.program_id(1), first_row, R, NEGATIVES, BLOCK_R)
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
        cols, there = _tile_columns(columns_ptr, start, count, fits, tile, N, BLOCK_C)
        x_cols_at = cols.to(tl.int64)[:, None] * D + d[None, :]
        x_cols = tl.load(x_ptr + x_cols_at)
        if RESIDENT:
            z = tl.dot(x_cols, x_rows, input_precision=PRECISION)
        else:
            z = tile_product(x_ptr, x_ptr, cols, valid_rows, D, D, D, BLOCK_C, BLOCK_R, BLOCK_K, PRECISION)
        z *= scale
        if NEGATIVES:
            inside = _bits_at(negatives_ptr, item, cols, W)[:, None]
            weight = tl.where(inside, gl_i * tl.exp2(z - lse_i), 0.0)
        else:
            positive = _bits_at(positives_ptr, valid_mask_rows[None, :], cols[:, None], W)
            positive_t = positive
            if not SYMMETRIC_POSITIVES:
                positive_t = _bits_at(positives_t_ptr, valid_mask_rows[None, :], cols[:, None], W)
            inside, inside_t = positive, positive_t
            if HAS_NEGATIVES:
                inside &= _bits_at(negatives_ptr, (valid_rows % R)[None, :], cols[:, None], W) == 0
                inside_t &= _bits_at(negatives_ptr, (cols % R)[:, None], valid_rows[None, :], W) == 0
            lse_j = tl.load(lse_ptr + cols)[:, None]
            gl_j = tl.load(grad_lse_ptr + cols)[:, None]
            gp_j = tl.load(grad_pos_ptr + cols)[:, None]
            weight = tl.where(inside, gl_i * tl.exp2(z - lse_i), 0.0)
            weight += tl.where(inside_t, gl_j * tl.exp2(z - lse_j), 0.0)
            weight += tl.where(positive, gp_i, 0.0) + tl.where(positive_t, gp_j, 0.0)
            if HAS_EXTRA:
                ge_j = tl.load(grad_ext_ptr + cols)[:, None]
                also = _bits_at(extra_ptr, valid_mask_rows[None, :], cols[:, None], W)
                also_t = also
                if not SYMMETRIC_EXTRA:
                    also_t = _bits_at(extra_t_ptr, valid_mask_rows[None, :], cols[:, None], W)
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

    def __init__(
        self, lists: _Lists, negatives: Tensor, total: int, first_row: int, n: int, d: int, dtype: torch.dtype
    ):
        period = negatives.shape[0]
        self.bits = transpose_bits(negatives, total)
        width = self.bits.shape[1]
        self.counts = torch.empty(total, dtype=torch.int32, device=negatives.device)
        self.prefix = torch.empty((total, width), dtype=torch.int32, device=negatives.device)
        with on_device(negatives):
            _contrastive_count_columns_kernel[(total,)](
                *[self.bits] * 4, self.counts, self.prefix, 1, total - 1, width,
                MASKS=1, STORE_PREFIX=True, BLOCK_W=_SCAN_WORDS, num_warps=1,
            )  # fmt: skip
        self.counts[:first_row] = 0
        self.counts[first_row + n :] = 0
        windows = common.ColumnWindows(self.counts, first_row, n, period, lists.capacity, d * dtype.itemsize)
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
    positive_lists = _positive_lists(total, *masks[:4])
    if negatives is not None:
        negative_lists = _negative_lists(negatives, total)
        side = _ColumnSide(negative_lists, negatives, total, first_row, n, d, x.dtype)
        partial = torch.empty((n, d), dtype=torch.float32, device=x.device)
        one = torch.ones_like(out_scale)
        blocks = triton.cdiv(triton.cdiv(n, period), _NEGATIVE_ROWS)
    with on_device(x):
        for s in range(streams):
            vectors = [table[s] for table in tables]
            sizes = (first_row, n, total, d, period, width, scale)
            if negatives is None:
                _contrastive_listed_grad_kernel[(positive_lists.number, 1, pieces)](
                    x[s], *bits, *positive_lists.arguments(), *vectors, out_scale, out[s], out.shape[2], *sizes,
                    NEGATIVES=False, ADD=False, BLOCK_R=_PANEL, **listed,
                )  # fmt: skip
                continue
            _contrastive_listed_grad_kernel[(positive_lists.number, 1, pieces)](
                x[s], *bits, *positive_lists.arguments(), *vectors, one, partial, d, *sizes,
                NEGATIVES=False, ADD=False, BLOCK_R=_PANEL, **listed,
            )  # fmt: skip
            _contrastive_listed_grad_kernel[(negative_lists.number, blocks, pieces)](
                x[s], *bits, *negative_lists.arguments(), *vectors, one, partial, d, *sizes,
                NEGATIVES=True, ADD=True, BLOCK_R=_NEGATIVE_ROWS, **listed,
            )  # fmt: skip
            for w in range(side.windows):
                window = side.bounds[w : w + 2]
                _contrastive_column_side_kernel[(period, _COLUMN_SPLITS, pieces)](
                    x[s], negatives, negative_lists.prefix, *negative_lists.arguments(),
                    side.bits, side.prefix, side.counts, side.starts, window, side.workspace,
                    *vectors[:2], total, d, period, width, side.bits.stride(0), scale,
                    BLOCK_R=_NEGATIVE_ROWS, **options,
                )  # fmt: skip
                _contrastive_column_sum_kernel[(min(n, _SUM_PROGRAMS),)](
                    x[s], side.bits, side.counts, side.starts, negative_lists.starts, negative_lists.capacity,
                    window, side.workspace, *vectors[:2], partial, out_scale, out[s],
                    out.shape[2], first_row, total, d, period, side.bits.stride(0), scale,
                    BLOCK_D=triton.next_power_of_2(d), BLOCK_R=16, BLOCK_S=_SUM_ROWS, num_warps=2 if d <= 256 else 4,
                )  # fmt: skip
    return out
