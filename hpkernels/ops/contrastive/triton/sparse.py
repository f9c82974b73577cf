"""The statistics of the sparse denominator: only listed columns are visited (`lists`).

E = M and "P without M" are summed apart: over the columns of each row of the negatives, and over those where a panel of
rows has any positive. Logits are in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.gpu import LOG2E, padded_rows
from hpkernels.ops.common.triton import LN2, on_device, precision, tile_product
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.triton.lists import (
    PANEL,
    bits_at,
    list_rows,
    negative_lists,
    positive_lists,
    tile_columns,
)


@triton.jit
def _contrastive_listed_stats_kernel(
    x_ptr, positives_ptr, extra_ptr, negatives_ptr, starts_ptr, counts_ptr, columns_ptr,
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
    mask_rows = list_rows(item, tl.program_id(1), first_row, R, NEGATIVES, BLOCK_R)
    valid_mask_rows = tl.minimum(mask_rows, n - 1)
    rows, valid_rows = first_row + mask_rows, first_row + valid_mask_rows
    start, count = tl.load(starts_ptr + item), tl.load(counts_ptr + item)
    total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    pos = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    ext = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    shift = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if FIXED_SHIFT:
        shift = tl.zeros([BLOCK_R], tl.float32) + fixed_shift
    for tile in range(0, tl.cdiv(tl.abs(count), BLOCK_C)):
        cols, there = tile_columns(columns_ptr, start, count, tile, BLOCK_C)
        z = tile_product(x_ptr, x_ptr, cols, valid_rows, D, D, D, BLOCK_C, BLOCK_R, BLOCK_K, PRECISION)
        z *= scale
        others = (rows[None, :] != cols[:, None]) & there[:, None]
        if NEGATIVES:
            inside = others & bits_at(negatives_ptr, item, cols, W)[:, None]
        else:
            positive = others & bits_at(positives_ptr, valid_mask_rows[None, :], cols[:, None], W)
            pos += tl.where(positive, z, 0.0)
            inside = positive
            if HAS_NEGATIVES:
                inside = positive & (bits_at(negatives_ptr, (valid_rows % R)[None, :], cols[:, None], W) == 0)
            if HAS_EXTRA:
                ext += tl.where(others & bits_at(extra_ptr, valid_mask_rows[None, :], cols[:, None], W), z, 0.0)
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
    negative_rows = config.pop("BLOCK_R")
    x = padded_rows(x, config["BLOCK_K"])
    streams, total, d = x.shape
    n, period = masks.anchors, masks.period(total)
    positives, _, extra, _, negatives = masks.filled()
    families = [(False, positive_lists(total, masks.positives, masks.extra), PANEL, 1)]
    if masks.negatives is not None:
        blocks = triton.cdiv(triton.cdiv(n, period), negative_rows)
        families.append((True, negative_lists(masks.negatives, total), negative_rows, blocks))
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
