"""Bits of the pairs above their threshold.

A program computes the products of a tile and packs their comparisons. It does not go through numbers 0 and 1, but takes
the sign of theta_ij - s_ij and shifts 32 of them into a word; everything after that works on words, 32 pairs at a time.
Packed words are moved by `_swap`, which exchanges one bit of the position within a word with one bit of the position of
the word: two swaps put the columns of a row in order, four more turn blocks of 16 x 16 bits for the mirror image.

With descriptors (GPUs with a tensor memory accelerator) a program walks over many tiles, and its two loops, over tiles
and over steps of the products, are compiled as one: the copies of the next tile's operands run while a tile is packed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info

from hpkernels import tuning
from hpkernels.common.bits import words
from hpkernels.ops.common import gpu
from hpkernels.ops.common.triton import on_device, precision, require_supported, triangle_tile
from hpkernels.ops.similarity_search.triton.operands import descriptors, operands, products

_GROUP = 8


# ------------------------------------------------------------------ bits of a tile


@triton.jit
def _signs(s, theta):
    """uint32 numbers whose top bit is [s > theta]; theta is not -0.0."""
    if target_info.is_cuda():  # one addition: a difference is 0 of equal numbers only, and NVIDIA's NaN has no sign
        signs = (theta - s).to(tl.uint32, bitcast=True)
    else:
        signs = tl.where(s > theta, tl.full([1, 1], 0x80000000, tl.uint32), 0)
    return signs


@triton.jit
def _limits(threshold_ptr, at):
    """Thresholds with one zero, 0.0: -0.0 - 0.0 would have a sign."""
    theta = tl.load(threshold_ptr + at)
    return tl.where(theta == 0.0, 0.0, theta)


@triton.jit
def _append(words, signs, AXES: tl.constexpr):
    """Shifts the top bits of signs [*words.shape, 2, 2, ...] into the words, the last of 2^AXES first."""
    if AXES == 0:
        words = (words << 1) | (signs >> 31)
    else:
        first, second = tl.split(signs)
        words = _append(_append(words, second, AXES - 1), first, AXES - 1)
    return words


@triton.jit
def _swap(words, OUTER: tl.constexpr, INNER: tl.constexpr, BIT: tl.constexpr):
    """Words seen as [OUTER, 2, INNER]: the middle index trades places with bit BIT of the position within the words."""
    SHIFT: tl.constexpr = 1 << BIT
    LOW: tl.constexpr = 0xFFFFFFFF // ((1 << SHIFT) + 1)  # positions without that bit
    words = tl.reshape(words, [OUTER, 2, INNER])
    shift = ((1 - tl.arange(0, 2)) * SHIFT).to(tl.uint32)[None, :, None]
    leaving = (words >> shift) & LOW
    coming = tl.sum(leaving, 1, keep_dims=True) - leaving  # what leaves the other one
    staying = tl.full([1, 1, 1], LOW, tl.uint32) << (SHIFT - shift)
    return (words & staying) | (coming << shift)


@triton.jit
def _words_by_rows(signs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """uint32 [ROWS, COLUMNS // 32]: bit c % 32 of word c // 32 is the top bit of signs[row, c].

    Column 128 x + 64 k1 + 32 k0 + 16 n1 + 8 n0 + 4 q1 + 2 q0 + b. In a tile as the matrix units leave it a thread holds
    one q of a row and all of the rest, so a word of bits n1 n0 k1 k0 b takes no exchange between threads. Two swaps of
    words make them n1 n0 q1 q0 b.
    """
    X: tl.constexpr = COLUMNS // 128
    signs = tl.reshape(signs, [ROWS, X, 2, 2, 2, 2, 4, 2])
    signs = tl.permute(signs, [0, 1, 6, 7, 3, 2, 5, 4])  # row x q b k0 k1 n0 n1
    words = _append(tl.zeros([ROWS, X, 4], tl.uint32), signs, 5)
    words = _swap(words, ROWS * X * 2, 1, 1)
    words = _swap(words, ROWS * X, 2, 2)
    return tl.reshape(words, [ROWS, COLUMNS // 32])


@triton.jit
def _halves_by_columns(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """uint16 [COLUMNS, ROWS // 16] of the words of `_words_by_rows`: bit r of [c, h] is row 16 h + r's bit c."""
    WORDS: tl.constexpr = COLUMNS // 32
    for bit in tl.static_range(4):
        words = _swap(words, ROWS >> (bit + 1), WORDS << bit, bit)
    words = tl.reshape(words, [ROWS // 16, 16, WORDS])  # their bits: column bit 4, then 4 bits of the row
    high = (16 * tl.arange(0, 2)).to(tl.uint32)
    halves = ((words[:, :, :, None] >> high[None, None, None, :]) & 0xFFFF).to(tl.uint16)
    return tl.reshape(tl.permute(halves, [2, 3, 1, 0]), [COLUMNS, ROWS // 16])


@triton.jit
def _ones_from(first):
    """uint32 [rows, words] with ones from bit `first` on."""
    ones = tl.full([1, 1], 0xFFFFFFFF, tl.uint32) << tl.minimum(tl.maximum(first, 0), 31).to(tl.uint32)
    return tl.where(first < 32, ones, 0)


# ------------------------------------------------------------------ kernels


@triton.jit
def _tile_words(
    x_ptr, k_ptr, x_tiles, k_tiles, threshold_ptr, key_threshold_ptr, first_row, first_col, N, M, C,
    stride_x, stride_k, HAS_KEY_THRESHOLDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The words of a tile, bits of columns j < M only: [s_ij > min(t_i, kt_j)] or [s_ij > t_i]."""
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), N - 1)
    cols = tl.minimum(first_col + tl.arange(0, BLOCK_N), M - 1)
    s = products(
        x_ptr, k_ptr, x_tiles, k_tiles, first_row, first_col, rows, cols, C, stride_x, stride_k,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    theta = _limits(threshold_ptr, rows)[:, None]
    if HAS_KEY_THRESHOLDS:
        key_theta = _limits(key_threshold_ptr, cols)[None, :]
        theta = tl.minimum(theta, key_theta, propagate_nan=tl.PropagateNan.ALL)
    found = _words_by_rows(_signs(s, theta), BLOCK_M, BLOCK_N)
    word = first_col // 32 + tl.arange(0, BLOCK_N // 32)
    return found & (_ones_from((M - 32 * word)[None, :]) ^ 0xFFFFFFFF)


@triton.jit
def _pairs_above_triangle_kernel(
    x_ptr, x_tiles, k_tiles, threshold_ptr, bits_ptr, N, C, stride_x, stride_bits, count,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Bits of tiles on and above the diagonal and, from the same numbers, of their mirror images.

    Squares of BLOCK_N are cut into BLOCK_N / BLOCK_M tiles. Of a tile, blocks of BLOCK_M columns that lie below the
    diagonal are not stored; the block on it is its own mirror image.
    """
    tl.assume(C > 0)
    RATIO: tl.constexpr = BLOCK_N // BLOCK_M
    WORDS: tl.constexpr = BLOCK_N // 32
    HALVES: tl.constexpr = BLOCK_M // 16
    for p in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=x_tiles is not None):
        square = tl.cast(p // RATIO, tl.int32)  # the interpreter counts in Python's numbers
        r, c = triangle_tile(square, GROUP, tl.cdiv(N, BLOCK_N))
        r = r * RATIO + p % RATIO
        found = _tile_words(
            x_ptr, x_ptr, x_tiles, k_tiles, threshold_ptr, threshold_ptr, r * BLOCK_M, c * BLOCK_N, N, N, C,
            stride_x, stride_x, True, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        rows = r * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = c * BLOCK_N + tl.arange(0, BLOCK_N)
        word = c * WORDS + tl.arange(0, WORDS)
        found = found & _ones_from(rows[:, None] + 1 - 32 * word[None, :])
        mirror = _halves_by_columns(found, BLOCK_M, BLOCK_N)
        if c == r // RATIO:
            blocks = tl.reshape(found, [BLOCK_M, RATIO, WORDS // RATIO])
            own = (tl.arange(0, RATIO) == r % RATIO)[None, :, None]
            block = tl.sum(tl.where(own, blocks, 0), 1)  # the one on the diagonal
            high = (16 * tl.arange(0, 2)).to(tl.uint32)[None, None, :]
            halves = tl.reshape(((block[:, :, None] >> high) & 0xFFFF).to(tl.uint16), [1, BLOCK_M, HALVES])
            halves = tl.where(tl.trans(own, 1, 0, 2), halves, 0)
            mirror = mirror | tl.reshape(halves, [BLOCK_N, HALVES])
        words_at = rows.to(tl.int64)[:, None] * stride_bits + word[None, :]
        above = (word * 32 // BLOCK_M > r) & (word < stride_bits)
        tl.store(bits_ptr + words_at, found.to(tl.int32, bitcast=True), mask=(rows < N)[:, None] & above[None, :])
        half = r * HALVES + tl.arange(0, HALVES)
        halves_at = cols.to(tl.int64)[:, None] * (2 * stride_bits) + half[None, :]
        from_diagonal = (cols // BLOCK_M >= r) & (cols < N)
        halves_ptr = bits_ptr.to(tl.pointer_type(tl.int16))
        tl.store(halves_ptr + halves_at, mirror.to(tl.int16, bitcast=True), mask=from_diagonal[:, None])


@triton.jit
def _pairs_above_tile_kernel(
    x_ptr, x_tiles, k_tiles, threshold_ptr, k_ptr, key_threshold_ptr, bits_ptr, N, M, C,
    stride_x, stride_k, stride_bits, count, HAS_KEY_THRESHOLDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Bits of tiles of x against keys."""
    tl.assume(C > 0)
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_M), tl.cdiv(M, BLOCK_N)
    for p in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=x_tiles is not None):
        r, c = tl.swizzle2d(p // column_tiles, p % column_tiles, row_tiles, column_tiles, GROUP)
        found = _tile_words(
            x_ptr, k_ptr, x_tiles, k_tiles, threshold_ptr, key_threshold_ptr, r * BLOCK_M, c * BLOCK_N, N, M, C,
            stride_x, stride_k, HAS_KEY_THRESHOLDS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        rows = r * BLOCK_M + tl.arange(0, BLOCK_M)
        word = c * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
        words_at = rows.to(tl.int64)[:, None] * stride_bits + word[None, :]
        inside = (rows < N)[:, None] & (word < stride_bits)[None, :]
        tl.store(bits_ptr + words_at, found.to(tl.int32, bitcast=True), mask=inside)


def pairs_above(x: Tensor, thresholds: Tensor, keys: Tensor | None, key_thresholds: Tensor | None) -> Tensor:
    """Bits of s_ij > min(t_i, t_j), i != j, from the upper triangle (keys None), or of s_ij > min(t_i, kt_j)."""
    require_supported(x=x, keys=keys)
    symmetric = keys is None
    x, keys = operands(x, x if symmetric else keys)
    thresholds = thresholds.float().contiguous()
    (n, c), m = x.shape, keys.shape[0]
    bits = torch.empty((n, words(m)), dtype=torch.int32, device=x.device)
    if bits.numel() == 0:
        return bits
    config = tuning.lookup("pairs_above", x.dtype, c, n, x.device)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    squares = triton.cdiv(m, block_n)
    count = squares * (squares + 1) // 2 * (block_n // block_m) if symmetric else triton.cdiv(n, block_m) * squares
    programs, tiles = count, (None, None)
    if persistent := config.pop("persistent"):  # programs a multiprocessor
        programs = min(count, persistent * gpu.processor_count(x.device))
        tiles = descriptors(x, keys, config)
    options = dict(PRECISION=precision(x.dtype), GROUP=_GROUP, **config)
    with on_device(x):
        if symmetric:
            _pairs_above_triangle_kernel[(programs,)](
                x, *tiles, thresholds, bits, n, c, x.stride(0), bits.stride(0), count, **options
            )
        else:
            key_theta = thresholds if key_thresholds is None else key_thresholds.float().contiguous()
            _pairs_above_tile_kernel[(programs,)](
                x, *tiles, thresholds, keys, key_theta, bits, n, m, c, x.stride(0), keys.stride(0), bits.stride(0),
                count, HAS_KEY_THRESHOLDS=key_thresholds is not None, **options,
            )  # fmt: skip
    return bits
