"""The column side of the negatives: dX_j of the rows i whose M names j.

Neighbouring columns are named by different rows, so nothing is shared between them as it is between the rows of one
token position t. So there are two steps: products W_t^T X_t give one vector for each pair (t, column), a *slot*, and
each column adds up its slots in the order of t. The slots of all pairs would fill gigabytes: columns go by in windows.

One launch does it all, with workspace for two windows. Its programs take items from a queue in the order

    products of window 0, products of window 1, sums of window 0, products of window 2, sums of window 1, ...

Sums wait for all products of their window, products for the sums of the window before the last. An item waits only for
earlier ones, which are done or at work in a program that runs, so the wait ends. How many windows there are is read
from the bits on the device: any masks find room, and the work grows with the number of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.gpu import processor_count
from hpkernels.ops.common.triton import popcount, precision, tile_product, transpose_bits
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.triton.lists import Lists, bits_at, list_rows, tile_columns

WINDOW_BYTES = 32 << 20  # of slots; two windows are at work
_WORKERS_PER_PROCESSOR = 4
_SUM_ITEMS = 132  # of the sums of a window
_SUM_COLUMNS, _SUM_NUMBERS = 16, 1024  # at most, that a program and one of its warps add up at a time
_RANK_COLUMNS, _RANK_WORDS = 64, 32


@triton.jit
def _contrastive_rank_kernel(
    turned_ptr, ranks_ptr, counts_ptr, first_row, n, N, W, factor, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """ranks[j, word] = set bits of row j before the word; counts[j] = factor times all of them, for rows first_row ...
    first_row + n, else 0."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, W, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        at = columns.to(tl.int64)[:, None] * W + word[None, :]
        mask = (columns < N)[:, None] & (word < W)[None, :]
        bits = popcount(tl.load(turned_ptr + at, mask=mask, other=0))
        tl.store(ranks_ptr + at, count[:, None] + tl.cumsum(bits, 1) - bits, mask=mask)
        count += tl.sum(bits, 1)
    anchor = (columns >= first_row) & (columns < first_row + n)
    tl.store(counts_ptr + columns, tl.where(anchor, count * factor, 0), mask=columns < N)


@triton.jit
def _rank(bits_ptr, ranks_ptr, row, column, W):
    """Set bits of the row before the column, which is there."""
    at = row.to(tl.int64) * W + (column >> 5)
    return tl.load(ranks_ptr + at) + popcount(tl.load(bits_ptr + at) & ((1 << (column & 31)) - 1))


@triton.jit
def _wait(counter_ptr, number):
    """Until `number` items are done. What they wrote can then be read."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < number:
        pass
    tl.debug_barrier()


@triton.jit
def _done(counter_ptr):
    """Tells that this program's item is done: all that it wrote is there."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _contrastive_column_side_kernel(
    x_ptr, negatives_ptr, ranks_ptr, lists_start_ptr, lists_count_ptr, lists_ptr, turned_ptr, turned_ranks_ptr,
    starts_ptr, bounds_ptr, progress_ptr, workspace_ptr, rooms,
    lse_ptr, grad_lse_ptr, partial_ptr, out_scale_ptr, out_ptr, D_out,
    quota, blocks, products, sum_items, first_row, n, N, D, R, W, W_turned, scale,
    RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PADDED_D: tl.constexpr, SUM_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_j = out_scale (partial_j + sum over the rows i whose M names j of grad_lse_i p_ij x_i), one stream.

    progress: the queue, then two counters a window, of its products and of its sums. A window has R blocks ceil(D /
    BLOCK_D) products.
    """
    windows = tl.maximum(tl.cdiv(tl.load(starts_ptr + N), quota), 1).to(tl.int32)
    work = tl.atomic_add(progress_ptr, 1, sem="relaxed")
    cleared = 1  # windows up to it find room in the workspace
    while work < (windows + 1).to(tl.int64) * (products + sum_items):
        step, item = (work // (products + sum_items)).to(tl.int32), (work % (products + sum_items)).to(tl.int32)
        summing = item >= products
        window = tl.where(summing, step - 1, step)
        if (window >= 0) & (window < windows):
            first = tl.load(bounds_ptr + window)
            last = tl.where(window == windows - 1, first_row + n, tl.load(bounds_ptr + window + 1))
            origin = tl.load(starts_ptr + first) - tl.where(window % 2 == 1, rooms, 0)
            progress_at = progress_ptr + 1 + 2 * window
            if summing:
                _wait(progress_at, products)
                _sum_slots(
                    starts_ptr, origin, workspace_ptr, partial_ptr, out_scale_ptr, out_ptr, D_out, D, first_row,
                    first + (item - products) * SUM_COLUMNS, last, sum_items * SUM_COLUMNS, PADDED_D, SUM_COLUMNS,
                )  # fmt: skip
                _done(progress_at + 1)
            else:
                if window > cleared:
                    _wait(progress_at - 3, sum_items)
                    cleared = window
                _column_products(
                    x_ptr, negatives_ptr, ranks_ptr, lists_start_ptr, lists_count_ptr, lists_ptr,
                    turned_ptr, turned_ranks_ptr, starts_ptr, origin, workspace_ptr, lse_ptr, grad_lse_ptr,
                    item % R, item // R % blocks, item // R // blocks,
                    first, last, blocks, N, D, R, W, W_turned, scale,
                    RESIDENT, BLOCK_C, BLOCK_R, BLOCK_D, BLOCK_K, PRECISION,
                )  # fmt: skip
                _done(progress_at)
        work = tl.atomic_add(progress_ptr, 1, sem="relaxed")


@triton.jit
def _column_products(
    x_ptr, negatives_ptr, ranks_ptr, lists_start_ptr, lists_count_ptr, lists_ptr, turned_ptr, turned_ranks_ptr,
    starts_ptr, origin, workspace_ptr, lse_ptr, grad_lse_ptr,
    t, block, piece, first, last, blocks, N, D, R, W, W_turned, scale,
    RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Slot of (t, block of its rows, j) = sum over the rows of grad_lse_i p_ij x_i, for the columns first ... last.

    Tiles are [rows, columns] and [D, columns]: the rows, which all tiles share, lead both products.
    """
    rows = list_rows(t, block, 0, R, True, BLOCK_R)
    valid_rows = tl.minimum(rows, N - 1)
    d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    x_rows = tl.load(x_ptr + valid_rows.to(tl.int64)[:, None] * D + d[None, :])
    lse_i = tl.load(lse_ptr + valid_rows)[:, None]
    gl_i = tl.where(rows < N, tl.load(grad_lse_ptr + valid_rows), 0.0)[:, None]
    start, count = tl.load(lists_start_ptr + t), tl.load(lists_count_ptr + t)
    if count > 0:  # the window's part of the list; of a list of blocks, what lies in the window
        begin = _rank(negatives_ptr, ranks_ptr, t, tl.minimum(first, N - 1), W)
        count = tl.where(last < N, _rank(negatives_ptr, ranks_ptr, t, tl.minimum(last, N - 1), W), count) - begin
        start += begin
    for tile in range(0, tl.cdiv(tl.abs(count), BLOCK_C)):
        cols, there = tile_columns(lists_ptr, start, count, tile, BLOCK_C)
        there &= (cols >= first) & (cols < last) & bits_at(negatives_ptr, t, cols, W)
        if RESIDENT:
            x_cols = tl.load(x_ptr + cols.to(tl.int64)[None, :] * D + d[:, None])
            z = tl.dot(x_rows, x_cols, input_precision=PRECISION)
        else:
            z = tile_product(x_ptr, x_ptr, valid_rows, cols, D, D, D, BLOCK_R, BLOCK_C, BLOCK_K, PRECISION)
        weight = tl.where(rows[:, None] != cols[None, :], gl_i * tl.exp2(z * scale - lse_i), 0.0)
        sums = tl.dot(tl.trans(x_rows), weight.to(x_rows.dtype), input_precision=PRECISION)
        rank = _rank(turned_ptr, turned_ranks_ptr, cols, t + tl.zeros_like(cols), W_turned)
        slot = tl.load(starts_ptr + cols) - origin + rank.to(tl.int64) * blocks + block
        out_at = slot[None, :] * D + d[:, None]
        tl.store(workspace_ptr + out_at, sums.to(workspace_ptr.dtype.element_ty), mask=there[None, :])


@triton.jit
def _sum_slots(
    starts_ptr, origin, workspace_ptr, partial_ptr, out_scale_ptr, out_ptr, D_out, D, first_row, first, last, step,
    PADDED_D: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out_j of SUM_COLUMNS columns at a time, every step-th of such groups, from column `first` on."""
    d = tl.arange(0, PADDED_D)[None, :]
    for group in range(first, last, step):
        columns = group + tl.arange(0, SUM_COLUMNS)
        there = columns < last
        start = tl.load(starts_ptr + columns, mask=there, other=0)
        count = (tl.load(starts_ptr + columns + 1, mask=there, other=0) - start).to(tl.int32)
        row = (columns - first_row).to(tl.int64)[:, None]
        sums = tl.load(partial_ptr + row * D + d, mask=there[:, None] & (d < D), other=0.0)
        slot_ptr = workspace_ptr + (start - origin)[:, None] * D + d
        for slot in tl.range(0, tl.max(count, 0), num_stages=3):
            sums += tl.load(slot_ptr, mask=(slot < count)[:, None] & (d < D), other=0.0).to(tl.float32)
            slot_ptr += D
        out = (sums * tl.load(out_scale_ptr)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * D_out + d, out, mask=there[:, None] & (d < D_out))


class ColumnSide:
    """The turned negatives, where the slots of each column lie, and the workspace of two windows.

    Column j has the slots starts[j] ... starts[j + 1], the windows are the columns between two `bounds`. Only columns
    that are anchors have slots. A window's columns begin within one quota of slots: the last of them reaches past it.
    """

    def __init__(self, masks: Masks, lists: Lists, total: int, d: int, dtype: torch.dtype, config: dict):
        assert masks.negatives is not None
        self._negatives, self._lists, self._config = masks.negatives, lists, config
        self._anchors = first_row, n = masks.first_row, masks.anchors
        device, period = masks.negatives.device, len(masks.negatives)
        self._blocks = triton.cdiv(total // period, config["BLOCK_R"])
        most = period * self._blocks  # slots of a column
        self._turned = transpose_bits(masks.negatives, total)
        self._ranks, _ = _ranks(masks.negatives, 0, period, 1)
        self._turned_ranks, counts = _ranks(self._turned, first_row, n, self._blocks)
        self._starts = torch.zeros(total + 1, dtype=torch.int64, device=device)
        torch.cumsum(counts, 0, out=self._starts[1:])
        self._quota = max(most, WINDOW_BYTES // (d * dtype.itemsize) - most)
        self._windows = max(1, triton.cdiv(n * most, self._quota))  # as many as there can be
        marks = torch.arange(0, (self._windows + 1) * self._quota, self._quota, device=device)
        self._bounds = torch.searchsorted(self._starts, marks, out_int32=True).clamp_(first_row, first_row + n)
        self._rooms = self._quota + most

    def add(
        self, x: Tensor, lse: Tensor, grad_lse: Tensor, scale: float, partial: Tensor, out_scale: Tensor, out: Tensor
    ) -> None:
        """out = out_scale (partial + the column side) of one stream (N, d)."""
        workspace = x.new_empty(2 * self._rooms, x.shape[1])
        products = len(self._negatives) * self._blocks * triton.cdiv(x.shape[1], self._config["BLOCK_D"])
        padded = triton.next_power_of_2(x.shape[1])
        sum_columns = max(1, min(_SUM_COLUMNS, _SUM_NUMBERS * self._config["num_warps"] // padded))
        progress = torch.zeros(1 + 2 * self._windows, dtype=torch.int64, device=x.device)
        _contrastive_column_side_kernel[(_WORKERS_PER_PROCESSOR * processor_count(x.device),)](
            x, self._negatives, self._ranks, *self._lists.arguments(), self._turned, self._turned_ranks,
            self._starts, self._bounds, progress, workspace, self._rooms,
            lse, grad_lse, partial, out_scale, out, out.shape[1],
            self._quota, self._blocks, products, _SUM_ITEMS, *self._anchors, *x.shape,
            *self._negatives.shape, self._turned.shape[1], scale,
            PADDED_D=padded, SUM_COLUMNS=sum_columns, PRECISION=precision(x.dtype),
            **self._config,
        )  # fmt: skip


def _ranks(bits: Tensor, first_row: int, n: int, factor: int) -> tuple[Tensor, Tensor]:
    """Set bits before each word, and in the rows first_row ... first_row + n, times factor."""
    rows, width = bits.shape
    ranks, counts = torch.empty_like(bits), bits.new_empty(rows)
    _contrastive_rank_kernel[(triton.cdiv(rows, _RANK_COLUMNS),)](
        bits, ranks, counts, first_row, n, rows, width, factor, BLOCK_N=_RANK_COLUMNS, BLOCK_W=_RANK_WORDS
    )
    return ranks, counts
