"""Column lists of the sparse denominator, built on the device from the bits, without synchronisation.

Two families of them, each of rows of words:

    negatives   row t of M, shared by the rows t, t + R, t + 2R, ... (one token position of all images): a small dense
                product of those rows with the gathered columns
    positives   the union of the P and Q bits of 16 consecutive rows

Lists of columns lie one behind another in a pool of fixed size, each padded to whole tiles. A list that finds no room
there names the blocks of 64 columns that have a bit at all, for which there is always room. The bits decide anyway, so
the result is the same, and either way the tiles visited are at most the columns listed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.triton import count_bits, on_device, popcount

PANEL = 16  # rows that share a list of positives
BLOCK = tl.constexpr(64)  # columns of a block, and what lists are padded to: every BLOCK_C divides it
SCAN_WORDS = tl.constexpr(128)  # words listed at a time
_UNION_WORDS = 256
_POOL_SHARES = (1 / 16, 5 / 32)  # of all columns of all lists, of positives and of negatives, those that find room


@triton.jit
def _contrastive_union_kernel(a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, last_row, W, MASKS: tl.constexpr,
                              ROWS: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """out[p] = OR of the words of rows ROWS p ... of up to four masks."""
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    union = tl.zeros([BLOCK_W], tl.int32)
    for r in tl.static_range(ROWS):
        at = tl.minimum(tl.program_id(0) * ROWS + r, last_row).to(tl.int64) * W + word
        union |= tl.load(a_ptr + at, mask=word < W, other=0)
        if MASKS > 1:
            union |= tl.load(b_ptr + at, mask=word < W, other=0)
        if MASKS > 2:
            union |= tl.load(c_ptr + at, mask=word < W, other=0)
        if MASKS > 3:
            union |= tl.load(d_ptr + at, mask=word < W, other=0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * W + word, union, mask=word < W)


def _union_of_panels(masks: list[Tensor]) -> Tensor:
    """(panels, W): the columns where any row of a panel has a bit in any of the masks."""
    distinct = list({mask.data_ptr(): mask for mask in masks}.values())
    rows, width = distinct[0].shape
    out = distinct[0].new_empty(triton.cdiv(rows, PANEL), width)
    with on_device(out):
        _contrastive_union_kernel[(len(out), triton.cdiv(width, _UNION_WORDS))](
            *(distinct + distinct[:1] * 3)[:4], out, rows - 1, width,
            MASKS=len(distinct), ROWS=PANEL, BLOCK_W=_UNION_WORDS, num_warps=2,
        )  # fmt: skip
    return out


@triton.jit
def list_columns(row_ptr, word, first, last, list_ptr, listed):
    """Appends the set bits first ... last of SCAN_WORDS words to the `listed` columns; returns how many there are."""
    index = word + tl.arange(0, SCAN_WORDS)
    words = tl.load(row_ptr + index, mask=index * 32 < last, other=0)
    before, after = tl.maximum(first - index * 32, 0), tl.maximum(index * 32 + 32 - last, 0)
    words = tl.where(before < 32, words & (-1 << (before & 31)), 0)
    words = tl.where(after < 32, (words << (after & 31)).to(tl.uint32, bitcast=True) >> (after & 31), 0)
    words = words.to(tl.int32, bitcast=True)
    bits = popcount(words)
    slot = listed + tl.cumsum(bits, 0) - bits
    for _ in range(0, tl.max(bits, 0)):
        lowest = words & -words
        tl.store(list_ptr + slot, index * 32 + popcount(lowest - 1), mask=words != 0)
        words ^= lowest
        slot += 1
    return listed + tl.sum(bits, 0)


@triton.jit
def _contrastive_fill_lists_kernel(bits_ptr, starts_ptr, counts_ptr, lists_ptr, capacity, N, W):
    """The columns of the list behind its start or, without room, its blocks behind the pool: a count below 0."""
    item = tl.program_id(0)
    row_ptr = bits_ptr + item.to(tl.int64) * W
    start = tl.load(starts_ptr + item)
    listed = 0
    if start + tl.load(counts_ptr + item) <= capacity:
        for word in range(0, W, SCAN_WORDS):
            listed = list_columns(row_ptr, word, 0, N, lists_ptr + start, listed)
    else:
        start = capacity + item.to(tl.int64) * tl.cdiv(N, BLOCK)
        count = 0
        for first in range(0, W, SCAN_WORDS):
            word = first + 2 * tl.arange(0, SCAN_WORDS // 2)
            words = tl.load(row_ptr + word, mask=word < W, other=0)
            words |= tl.load(row_ptr + word + 1, mask=word + 1 < W, other=0)
            some = (words != 0).to(tl.int32)
            tl.store(lists_ptr + start + listed + tl.cumsum(some, 0) - some, word * 32, mask=words != 0)
            listed += tl.sum(some, 0)
            count += tl.sum(some * tl.minimum(N - word * 32, BLOCK), 0)
        tl.store(starts_ptr + item, start)
        tl.store(counts_ptr + item, -count)


class Lists:
    """List n names |counts[n]| columns from starts[n] (int64) on: each of them or, below 0, the first of each block."""

    def __init__(self, bits: Tensor, n: int, share: float):
        """One list for each row of bits; that share of their n columns finds room."""
        self.number, width = bits.shape
        pool = self.number * (math.ceil(share * n) + BLOCK.value)  # all lists fit that have less than a block
        (self.counts,) = count_bits(bits)
        padded = (self.counts + (BLOCK.value - 1)) // BLOCK.value * BLOCK.value
        self.starts = padded.cumsum(0, dtype=torch.int64) - padded
        self.columns = bits.new_empty(pool + self.number * triton.cdiv(n, BLOCK.value))
        with on_device(bits):
            _contrastive_fill_lists_kernel[(self.number,)](
                bits, self.starts, self.counts, self.columns, pool, n, width, num_warps=4
            )

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.starts, self.counts, self.columns


def positive_lists(n: int, *masks: Tensor | None) -> Lists:
    return Lists(_union_of_panels([mask for mask in masks if mask is not None]), n, _POOL_SHARES[0])


def negative_lists(negatives: Tensor, n: int) -> Lists:
    return Lists(negatives, n, _POOL_SHARES[1])


@triton.jit
def tile_columns(columns_ptr, start, count, tile, BLOCK_C: tl.constexpr):
    """Columns of tile `tile` of a list, and which of them are there; the others are some column of the first block."""
    slot = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    there = slot < tl.abs(count)
    entry = tl.where(count < 0, slot // BLOCK, slot)
    offset = slot & tl.where(count < 0, BLOCK - 1, 0)
    return tl.load(columns_ptr + start + entry, mask=there, other=0) + offset, there


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
