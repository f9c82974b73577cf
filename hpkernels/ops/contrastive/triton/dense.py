"""The statistics of the dense denominator: every tile of the pairs is swept; a row panel owns its sums.

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
from hpkernels.ops.common.gpu import LOG2E, padded_rows
from hpkernels.ops.common.triton import LN2, bit_tile, on_device, precision, split_tiles, tile_product
from hpkernels.ops.contrastive.masks import Masks


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


def stats(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
