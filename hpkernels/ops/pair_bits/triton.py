"""Pair bits in Triton: counter-based Bernoulli bits, row counts, transposition; pairs from index lists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.common.bits import words
from hpkernels.ops.common.triton import on_device, popcount, transpose_bits

__all__ = ["count_bits", "pairs_from_indices", "random_bits", "transpose_bits"]

_RANDOM_WORDS = 512  # words a program draws
_COUNT_ROWS, _COUNT_WORDS = 8, 256


@triton.jit
def _keep_columns(words, index, columns):
    """Clears the bits of word `index` at and past `columns`."""
    tail = tl.minimum(tl.maximum(columns - index * 32, 0), 32)
    mask = tl.where(tail == 32, -1, (1 << (tail & 31)) - 1)
    return words & mask


@triton.jit(do_not_specialize=["columns", "q", "first_group"])
def _random_bits_kernel(seed_ptr, out_ptr, W, columns, q, first_group, BLOCK_W: tl.constexpr):
    """Bernoulli(q / 2^32) bits of one row, BLOCK_W words at a time.

    Philox4x32-10 with key = seed and counter = (word, row, group, 0) gives planes 4 group .. 4 group + 3. Bit-sliced
    comparison of a uniform 32-bit number with q, least significant plane first: a set bit of q ORs the plane in, a
    clear one ANDs it. Planes below q's lowest set bit change nothing, so `first_group` skips whole groups of them.
    """
    row = tl.program_id(0)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    seed = tl.load(seed_ptr)
    zero = tl.zeros([BLOCK_W], tl.int32)
    acc = tl.zeros([BLOCK_W], tl.uint32)
    for group in range(first_group, 8):
        planes = tl.philox(seed, word, zero + row, zero + group, zero)
        for lane in tl.static_range(4):
            plane = planes[lane]
            acc = tl.where(((q >> (4 * group + lane)) & 1) != 0, acc | plane, acc & plane)
    bits = _keep_columns(acc.to(tl.int32, bitcast=True), word, columns)
    tl.store(out_ptr + row.to(tl.int64) * W + word, bits, mask=word < W)


def random_bits(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """Bernoulli(rate) bits (rows, words) from a 0-dim int64 seed: P(bit) = round(rate 2^32) / 2^32 exactly."""
    width = words(columns)
    q = round(rate * 2**32)
    if q == 0 or rows == 0:
        return torch.zeros((rows, width), dtype=torch.int32, device=seed.device)
    if q == 2**32:
        word = torch.arange(width, device=seed.device, dtype=torch.int64)
        tail = (columns - word * 32).clamp(0, 32)
        return ((1 << tail) - 1).to(torch.int32).expand(rows, width).contiguous()
    bits = torch.empty((rows, width), dtype=torch.int32, device=seed.device)
    lowest = (q & -q).bit_length() - 1
    if bits.numel():
        with on_device(seed):
            _random_bits_kernel[(rows, triton.cdiv(width, _RANDOM_WORDS))](
                seed, bits, width, columns, q, lowest // 4, BLOCK_W=_RANDOM_WORDS
            )
    return bits


@triton.jit
def _count_bits_kernel(first_ptr, second_ptr, out_ptr, N, W, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """out[m, i] = set bits of row i of the first mask (m = 0) or the second."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    bits_ptr = first_ptr
    if tl.program_id(1) == 1:
        bits_ptr = second_ptr
    row_at = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * W
    counts = tl.zeros([BLOCK_M, BLOCK_W], tl.int32)
    for start in range(0, W, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        counts += popcount(tl.load(bits_ptr + row_at + word[None, :], mask=(word < W)[None, :], other=0))
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + rows, tl.sum(counts, 1), mask=rows < N)


def count_bits(*masks: Tensor) -> Tensor:
    """Set bits of each row of masks of one shape, (masks, N) int32."""
    masks = [bits.contiguous() for bits in masks]
    n, width = masks[0].shape
    out = torch.empty((len(masks), n), dtype=torch.int32, device=masks[0].device)
    if masks[0].numel() == 0:
        return out.zero_()
    with on_device(out):
        for first in range(0, len(masks), 2):
            pair = masks[first : first + 2]
            _count_bits_kernel[(triton.cdiv(n, _COUNT_ROWS), len(pair))](
                pair[0], pair[-1], out[first], n, width, BLOCK_M=_COUNT_ROWS, BLOCK_W=_COUNT_WORDS
            )
    return out


def pairs_from_indices(indices: Tensor, columns: int, symmetric: bool, first_row: int, rows: int) -> Tensor:
    """Bits of the pairs (i, indices[i, n]) of rows i = first_row .. first_row + rows - 1 of the mask.

    With `symmetric` also (indices[i, n], i), from all rows of `indices`, without the diagonal. Index -1 is no pair;
    repeated pairs count once. Sorts the pairs, then writes each word once: the sum of a word's bits is a difference of
    the running sum of all bit values (exact in wrapping int64), so nothing is accumulated in memory and no order
    matters.
    """
    width = words(columns)
    device = indices.device
    dump = rows * width * 32  # past every pair; its word takes what is not to be kept
    row = torch.arange(indices.shape[0], device=device)[:, None]
    absent = (indices < 0) | (indices == row) if symmetric else indices < 0
    own = slice(first_row, first_row + rows)
    codes = torch.where(absent[own], dump, (row[own] - first_row) * (width * 32) + indices[own]).flatten()
    if symmetric:
        named = indices - first_row  # the rows of the mask that the indices name
        absent = absent | (named < 0) | (named >= rows)
        codes = torch.cat([codes, torch.where(absent, dump, named * (width * 32) + row).flatten()])
    out = torch.zeros(rows * width + 1, dtype=torch.int32, device=device)
    if codes.numel():
        codes = codes.sort().values
        word = codes >> 5
        repeated = torch.zeros_like(codes, dtype=torch.bool)
        repeated[1:] = codes[1:] == codes[:-1]
        running = torch.where(repeated, 0, 1 << (codes & 31)).cumsum(0)
        last = torch.ones_like(repeated)
        last[:-1] = word[1:] != word[:-1]
        # The running sum before a word: that of the last pair of any earlier word, which is the largest so far.
        ends = torch.where(last, running, 0)
        before = torch.zeros_like(running)
        before[1:] = ends.cummax(0).values[:-1]
        out.scatter_(0, torch.where(last, word, rows * width), (running - before).to(torch.int32))
    return out[: rows * width].view(rows, width)
