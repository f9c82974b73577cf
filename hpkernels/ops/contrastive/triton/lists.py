"""Column lists of the sparse denominator, built on the device from the bits, without synchronisation.

Two families of them:

    negatives   list t: the columns of row t of M, shared by the rows t, t + R, t + 2R, ... (one token position of all
                images): a small dense product of those rows with the gathered columns
    positives   list p: the columns where any of 16 consecutive rows has a P or Q bit

Lists lie one behind another in an array of fixed capacity, each padded to whole tiles. A list that finds no room is
walked as "every column" instead: the bits decide anyway, so the result is the same and only time is lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.triton import on_device, popcount

PANEL = 16  # rows that share a list of positives
NEGATIVE_ROWS = 32  # rows of one token position a program takes
_SCAN_WORDS = 64
_LIST_MULTIPLE = 64  # lists are padded to whole tiles: every BLOCK_C divides it
_LIST_SHARE = (5, 32)  # capacity of the lists as a share of all pairs (negatives) or all panels x columns (positives)


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


def count_columns(masks: list[Tensor], rows: int, num_warps: int) -> tuple[Tensor, Tensor]:
    """Set bits of the union of the masks in each `rows` rows, int32; for single rows also those before each word."""
    total_rows, width = masks[0].shape
    number = triton.cdiv(total_rows, rows)
    counts = torch.empty(number, dtype=torch.int32, device=masks[0].device)
    prefix = torch.empty((total_rows, width) if rows == 1 else 0, dtype=torch.int32, device=masks[0].device)
    with on_device(counts):
        _contrastive_count_columns_kernel[(number,)](
            *_four(masks), counts, prefix, rows, total_rows - 1, width,
            MASKS=len(masks), STORE_PREFIX=rows == 1, BLOCK_W=_SCAN_WORDS, num_warps=num_warps,
        )  # fmt: skip
    return counts, prefix


def _four(masks: list[Tensor]) -> list[Tensor]:
    return (masks + masks[:1] * 3)[:4]


class Lists:
    """Column lists: list n has counts[n] columns from starts[n] on (int64), if starts[n] + counts[n] <= capacity."""

    def __init__(self, masks: list[Tensor], n: int, rows: int, share_room: bool):
        """One list for each `rows` rows. Without share_room no list counts as fitting unless all do."""
        distinct = list({mask.data_ptr(): mask for mask in masks}.values())
        total_rows, width = distinct[0].shape
        self.number = triton.cdiv(total_rows, rows)
        columns = triton.cdiv(n * _LIST_SHARE[0], _LIST_SHARE[1])
        self.capacity = self.number * (triton.cdiv(columns, _LIST_MULTIPLE) + 1) * _LIST_MULTIPLE
        self.counts, self.prefix = count_columns(distinct, rows, num_warps=2)
        padded = (self.counts + (_LIST_MULTIPLE - 1)) // _LIST_MULTIPLE * _LIST_MULTIPLE
        ends = padded.cumsum(0, dtype=torch.int64)
        self.starts = ends - padded
        if not share_room:
            self.starts = torch.where(ends[-1] <= self.capacity, self.starts, self.capacity + 1)
        self.columns = torch.empty(self.capacity, dtype=torch.int32, device=self.counts.device)
        with on_device(self.counts):
            _contrastive_fill_columns_kernel[(self.number,)](
                *_four(distinct), self.starts, self.counts, self.columns, rows, total_rows - 1, width, self.capacity,
                MASKS=len(distinct), BLOCK_W=_SCAN_WORDS, num_warps=2,
            )  # fmt: skip

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.starts, self.counts, self.columns, self.capacity


def positive_lists(n: int, *masks: Tensor | None) -> Lists:
    return Lists([mask for mask in masks if mask is not None], n, PANEL, share_room=True)


def negative_lists(negatives: Tensor, n: int) -> Lists:
    return Lists([negatives], n, 1, share_room=False)


@triton.jit
def tile_columns(columns_ptr, start, count, fits, tile, N, BLOCK: tl.constexpr):
    """Columns of tile `tile` of a list, and which of them are there; of all columns where the list found no room."""
    slot = tile * BLOCK + tl.arange(0, BLOCK)
    there = slot < tl.where(fits, count, N)
    listed = tl.load(columns_ptr + start + slot, mask=slot < tl.where(fits, count, 0), other=0)
    return tl.where(there, tl.where(fits, listed, slot), 0), there


@triton.jit
def bits_at(bits_ptr, rows, cols, stride):
    """int1: bit (rows, cols), index tensors that broadcast."""
    return ((tl.load(bits_ptr + rows.to(tl.int64) * stride + (cols >> 5)) >> (cols & 31)) & 1) != 0


@triton.jit
def list_rows(item, block, first_row, R, NEGATIVES: tl.constexpr, BLOCK_R: tl.constexpr):
    """The rows of the masks (anchor = first_row + row) that share list `item`."""
    if NEGATIVES:
        rows = (item + R - first_row % R) % R + R * (block * BLOCK_R + tl.arange(0, BLOCK_R))
    else:
        rows = item * BLOCK_R + tl.arange(0, BLOCK_R)
    return rows
