"""The statistics of the dense denominator, by one of two kernels.

    triangle    all rows are anchors and the shift is fixed: l_ij = l_ji, so each tile of the upper triangle gives the
                sums of its rows and of its columns. Programs own square regions and leave parts of both; the parts of a
                row are added in the order of the regions.
    rows        a range of anchors, or a temperature so small that every row needs its own shift: every tile is swept,
                and a row panel owns its sums.

Logits are kept in base 2, z_ij = l_ij log2(e), so that exponentials are one exp2. Masks are read as words and expanded
in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.gpu import LOG2E, padded_rows, processor_count
from hpkernels.ops.common.triton import (
    LN2,
    bit_tile,
    on_device,
    precision,
    split_tiles,
    tile_product,
    triangle_programs,
    triangle_tile,
    turned_bit_tile,
)
from hpkernels.ops.contrastive.masks import Masks

PARTS_BYTES = 32 << 20  # of the triangle's parts, more where they would leave processors without work
_PROGRAMS_A_PROCESSOR = 4
_REGION_GROUP = 8  # columns of regions that are walked together


@triton.jit
def _contrastive_stats_kernel(
    x_ptr, positives_ptr, extra_ptr, negatives_ptr, total_ptr, shift_ptr, pos_ptr, ext_ptr,
    first_row, n, N, D, R, W, tiles_per_split, scale, fixed_shift,
    ALL: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_NEGATIVES: tl.constexpr, FIXED_SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row and split: sum_{j in E} exp2(z_ij - shift), the shift, sum_j P_ij l_ij and sum_j Q_ij l_ij."""
    mask_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_mask_rows = tl.minimum(mask_rows, n - 1)
    rows, valid_rows = first_row + mask_rows, first_row + valid_mask_rows
    split = tl.program_id(1)
    stream = tl.program_id(2)
    x_ptr += stream.to(tl.int64) * N * D
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
        positive = bit_tile(positives_ptr, valid_mask_rows, first_word, W, BLOCK_M, BLOCK_N) & others
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
            also = bit_tile(extra_ptr, valid_mask_rows, first_word, W, BLOCK_M, BLOCK_N) & others
            ext += tl.sum(tl.where(also, z, 0.0), 1)
    at = (split.to(tl.int64) * tl.num_programs(2) + stream) * n + mask_rows
    tl.store(total_ptr + at, total, mask=mask_rows < n)
    tl.store(shift_ptr + at, shift, mask=mask_rows < n)
    tl.store(pos_ptr + at, pos * LN2, mask=mask_rows < n)
    tl.store(ext_ptr + at, ext * LN2, mask=mask_rows < n)


@triton.jit
def _other_words(bits_ptr, bit_rows, rows, word, W):
    """int32 [rows]: word `word` of rows bit_rows of a mask, without the pair (i, i)."""
    words = tl.load(bits_ptr + bit_rows.to(tl.int64) * W + word)
    return tl.where(rows >> 5 == word, words & ~(1 << (rows & 31)), words)


@triton.jit
def _bits(words):
    """int1 [rows, 32] of int32 [rows]."""
    return ((words[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0


@triton.jit
def _add_sums(row_sums, column_sums, values, inside, inside_t, column_id, SAME: tl.constexpr):
    """Adds the sums of rows over `inside` to row_sums, those of columns over `inside_t` to row `column_id` of a table.

    The table holds a column in one lane of a warp; the sums themselves are in every thread that has a value of it.
    """
    of_rows = tl.where(inside, values, 0.0)
    of_columns = of_rows
    if not SAME:
        of_columns = tl.where(inside_t, values, 0.0)
    row_sums += tl.sum(of_rows, 1)
    column_ids = tl.arange(0, column_sums.shape[0])[:, None]
    column_sums += tl.where(column_ids == column_id, tl.sum(of_columns, 0)[None, :], 0.0)
    return row_sums, column_sums


@triton.jit
def _add_tile(
    sums, pos_sums, ext_sums, column_sums, products, region_row, panel, word, column_id,
    positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, N, R, W, scale, shift,
    ALL: tl.constexpr, SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the sums of rows and of columns of a tile whose columns begin with word `word` of the masks.

    Of exp2(scale * products - shift) over E, of the products over P and over Q. One word of columns at a time: masked
    values of a whole tile, and the addresses of what adds them up across warps, do not fit in registers beside it.
    """
    if BLOCK_N > 32:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(products, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        sums, pos_sums, ext_sums, column_sums = _add_tile(
            sums, pos_sums, ext_sums, column_sums, left, region_row, panel, word, column_id,
            positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, N, R, W, scale, shift,
            ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, BLOCK_M, HALF,
        )  # fmt: skip
        sums, pos_sums, ext_sums, column_sums = _add_tile(
            sums, pos_sums, ext_sums, column_sums, right, region_row, panel, word + HALF // 32, column_id + HALF // 8,
            positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, N, R, W, scale, shift,
            ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        # Not the rows of the copies, which the pipeline would carry in registers for the steps that they are ahead.
        rows = region_row + (panel * BLOCK_M + tl.arange(0, BLOCK_M))
        valid_rows = tl.minimum(rows, N - 1)
        positive = _other_words(positives_ptr, valid_rows, rows, word, W)
        positive_t = positive
        if not SYMMETRIC_POSITIVES:
            positive_t = _other_words(positives_t_ptr, valid_rows, rows, word, W)
        pos_sums, column_sums = _add_sums(
            pos_sums, column_sums, products, _bits(positive), _bits(positive_t), column_id + 1,
            SYMMETRIC_POSITIVES,
        )  # fmt: skip
        if HAS_EXTRA:
            extra = _other_words(extra_ptr, valid_rows, rows, word, W)
            extra_t = extra
            if not SYMMETRIC_EXTRA:
                extra_t = _other_words(extra_t_ptr, valid_rows, rows, word, W)
            ext_sums, column_sums = _add_sums(
                ext_sums, column_sums, products, _bits(extra), _bits(extra_t), column_id + 2, SYMMETRIC_EXTRA
            )
        e = tl.exp2(products * scale - shift)
        if ALL:
            left = N - word * 32
            there = tl.where(left >= 32, -1, (1 << tl.maximum(left, 0)) - 1)
            inside = _bits(tl.where(rows >> 5 == word, there & ~(1 << (rows & 31)), there))
            inside_t = inside
        elif HAS_NEGATIVES:
            inside = _bits(positive | _other_words(negatives_ptr, valid_rows % R, rows, word, W))
            column = word * 32 % R + tl.arange(0, 32)  # columns from N on: their sums are not stored
            column = tl.where(column < R, column, column - R)
            if R < 32:
                column %= R
            first_row = region_row + panel * BLOCK_M
            inside_t = _bits(positive_t) | turned_bit_tile(negatives_ptr, column, first_row >> 5, W, BLOCK_M, 32)
        else:
            inside, inside_t = _bits(positive), _bits(positive_t)
        sums, column_sums = _add_sums(
            sums, column_sums, e, inside, inside_t, column_id, ALL or (SYMMETRIC_POSITIVES and not HAS_NEGATIVES)
        )
    return sums, pos_sums, ext_sums, column_sums


@triton.jit
def _contrastive_triangle_stats_kernel(
    x_ptr, positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, parts_ptr,
    N, D, R, W, regions, scale, shift,
    ALL: tl.constexpr, SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part c of the rows of region r, and part r of the rows of region c, for one region (r, c) of the upper triangle.

    A region has SIDE rows and columns, a multiple of the tile. parts is (tables, regions, streams, N): the sums of
    exp2(z - shift) over E, of P_ij l_ij and, with extra, of Q_ij l_ij. Tiles go column by column, and steps over D run
    on from tile to tile, so that the copies never drain. On the diagonal all tiles are computed, for the sums of rows.
    """
    WORDS: tl.constexpr = BLOCK_N // 32
    r, c = triangle_tile(tl.program_id(0), GROUP)
    if c < regions:
        stream = tl.program_id(1)
        x_ptr += stream.to(tl.int64) * N * D
        column_sums = tl.zeros([4 * WORDS, 32], tl.float32)
        panels = tl.cdiv(tl.minimum(SIDE, N - r * SIDE), BLOCK_M)
        tiles = tl.cdiv(tl.minimum(SIDE, N - c * SIDE), BLOCK_N) * panels
        table = tl.cast(regions, tl.int64) * tl.num_programs(1) * N
        part_of_columns = (r.to(tl.int64) * tl.num_programs(1) + stream) * N
        part_of_rows = (c.to(tl.int64) * tl.num_programs(1) + stream) * N
        steps = D // BLOCK_K
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # Where the sums are, and where the copies are. These are ahead: no place is carried from one to the other.
        k, panel, first_column = 0, 0, c * SIDE
        copied, copied_panel, copied_column = 0, 0, c * SIDE
        for _ in range(0, tiles * steps):
            rows = tl.minimum(r * SIDE + copied_panel * BLOCK_M + tl.arange(0, BLOCK_M), N - 1)
            cols = tl.minimum(copied_column + tl.arange(0, BLOCK_N), N - 1)
            d = copied + tl.arange(0, BLOCK_K)
            a = tl.load(x_ptr + rows.to(tl.int64)[:, None] * D + d[None, :])
            b = tl.load(x_ptr + cols.to(tl.int64)[None, :] * D + d[:, None])
            copied += BLOCK_K
            copied_panel = tl.where(copied == D, copied_panel + 1, copied_panel)
            copied = tl.where(copied == D, 0, copied)
            copied_column = tl.where(copied_panel == panels, copied_column + BLOCK_N, copied_column)
            copied_panel = tl.where(copied_panel == panels, 0, copied_panel)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            k += 1
            if k == steps:
                nothing = tl.zeros([BLOCK_M], tl.float32)
                sums, pos_sums, ext_sums, column_sums = _add_tile(
                    nothing, nothing, nothing, column_sums, acc, r * SIDE, panel, first_column >> 5, 0,
                    positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, N, R, W, scale, shift,
                    ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                out_rows = r * SIDE + (panel * BLOCK_M + tl.arange(0, BLOCK_M))
                at = parts_ptr + part_of_rows + out_rows
                # The thread that stores a number reads it back. No barrier is needed, and none would be pipelined.
                again = (out_rows < N) & (first_column != c * SIDE)
                tl.store(at, tl.load(at, mask=again, other=0.0) + sums, mask=out_rows < N)
                at += table
                pos_sums = tl.load(at, mask=again, other=0.0) + pos_sums * (LN2 * scale)
                tl.store(at, pos_sums, mask=out_rows < N)
                if HAS_EXTRA:
                    at += table
                    ext_sums = tl.load(at, mask=again, other=0.0) + ext_sums * (LN2 * scale)
                    tl.store(at, ext_sums, mask=out_rows < N)
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                k = 0
                panel += 1
                if panel == panels:
                    if r != c:
                        ids = tl.arange(0, 4 * WORDS)[:, None]
                        out_cols = first_column + (ids // 4 * 32 + tl.arange(0, 32)[None, :])
                        of_columns = parts_ptr + part_of_columns + ids % 4 * table + out_cols
                        out = tl.where(ids % 4 == 0, column_sums, column_sums * (LN2 * scale))
                        tl.store(of_columns, out, mask=(out_cols < N) & (ids % 4 < 2 + HAS_EXTRA))
                    column_sums = tl.zeros([4 * WORDS, 32], tl.float32)
                    panel = 0
                    first_column += BLOCK_N


def stats(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (any number, S, n) of the sums of exponentials, their base-2 shifts, and of the two logit sums."""
    if masks.first_row == 0 and masks.anchors == x.shape[1] and common.has_fixed_shift(temperature):
        return _stats_of_triangle(x, masks, LOG2E / temperature)
    return _stats_of_rows(x, masks, temperature)


def _pairs(n: int, side: int) -> int:
    """Regions of the upper triangle."""
    regions = triton.cdiv(n, side)
    return regions * (regions + 1) // 2


def _region_side(n: int, streams: int, tables: int, tile: int, device: torch.device) -> int:
    """Rows of a region: the smallest whose parts are within the bound."""
    side, enough = tile, _PROGRAMS_A_PROCESSOR * processor_count(device)
    while tables * triton.cdiv(n, side) * streams * n * 4 > PARTS_BYTES and _pairs(n, 2 * side) * streams >= enough:
        side *= 2
    return side


def _stats_of_triangle(x: Tensor, masks: Masks, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "contrastive_stats_triangle" if masks.everything else "contrastive_stats_triangle_masked"
    config = tuning.lookup(op, x.dtype, x.shape[2], x.shape[1], x.device)
    x = padded_rows(x, config["BLOCK_K"])
    streams, n, d = x.shape
    bits = masks.filled()
    tables = 2 if masks.extra is None else 3
    side = _region_side(n, streams, tables, max(config["BLOCK_M"], config["BLOCK_N"]), x.device)
    regions = triton.cdiv(n, side)
    parts = torch.empty((tables, regions, streams, n), dtype=torch.float32, device=x.device)
    with on_device(x):
        _contrastive_triangle_stats_kernel[(triangle_programs(regions, _REGION_GROUP), streams)](
            x, *bits, parts, n, d, masks.period(n), bits[0].stride(0), regions, scale, scale,
            ALL=masks.everything, SYMMETRIC_POSITIVES=masks.positives_t is None, HAS_EXTRA=masks.extra is not None,
            SYMMETRIC_EXTRA=masks.extra_t is None, HAS_NEGATIVES=masks.negatives is not None,
            SIDE=side, GROUP=_REGION_GROUP, PRECISION=precision(x.dtype), **config,
        )  # fmt: skip
    shift = torch.full((1, 1, 1), scale, dtype=torch.float32, device=x.device)
    return parts[0], shift, parts[1], parts[2] if tables == 3 else torch.zeros_like(parts[1, :1])


def _stats_of_rows(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts (splits, S, n) of the sums of exponentials, their base-2 shifts, and of the two logit sums."""
    config = tuning.lookup("contrastive_stats", x.dtype, x.shape[2], x.shape[1], x.device)
    x = padded_rows(x, config["BLOCK_K"])
    streams, total, d = x.shape
    n = masks.anchors
    positives, _, extra, _, negatives = masks.filled()
    panels = triton.cdiv(n, config["BLOCK_M"])
    splits, tiles_per_split = split_tiles(panels * streams, triton.cdiv(total, config["BLOCK_N"]), x.device)
    parts = torch.empty((4, splits, streams, n), dtype=torch.float32, device=x.device)
    with on_device(x):
        _contrastive_stats_kernel[(panels, splits, streams)](
            x, positives, extra, negatives, *parts,
            masks.first_row, n, total, d, masks.period(total), positives.stride(0),
            tiles_per_split,
            LOG2E / temperature, LOG2E / temperature,
            ALL=masks.everything, HAS_EXTRA=masks.extra is not None, HAS_NEGATIVES=masks.negatives is not None,
            FIXED_SHIFT=common.has_fixed_shift(temperature), PRECISION=precision(x.dtype), **config,
        )  # fmt: skip
    return tuple(parts)
