"""The gradient of the sparse denominator: only listed columns are visited (`lists`).

dX_i collects the positives of both sides, the columns of M_i (the row side), and the rows whose M names i (the column
side, `columns`). The first two are sums that a panel of rows owns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common.gpu import LOG2E, padded_rows
from hpkernels.ops.common.triton import on_device, precision, tile_product
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.triton.columns import ColumnSide
from hpkernels.ops.contrastive.triton.lists import (
    PANEL,
    Lists,
    bits_at,
    list_rows,
    negative_lists,
    positive_lists,
    tile_columns,
)


@triton.jit
def _contrastive_listed_grad_kernel(
    x_ptr, positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
    starts_ptr, counts_ptr, columns_ptr,
    lse_ptr, grad_lse_ptr, grad_pos_ptr, grad_ext_ptr, out_scale_ptr, out_ptr, D_out, first_row, n, N, D, R, W, scale,
    NEGATIVES: tl.constexpr, ADD: tl.constexpr,
    SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i (+)= out_scale sum_{j in the list} w_ij x_j for BLOCK_R of the list's rows, one stream.

    A program makes BLOCK_D elements of the vectors: with RESIDENT all, and x_j is read once for both products.
    NEGATIVES: w = grad_lse_i p_ij over M's columns. Else both sides of the positives:
    w = gp_i P_ij + gp_j P_ji + ge_i Q_ij + ge_j Q_ji + gl_i [P_ij, not M_ij] p_ij + gl_j [P_ji, not M_ji] p_ji.
    The output tile is transposed, [D, rows], so that x_j^T, the long side, leads the second product too.
    """
    item, block, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mask_rows = list_rows(item, block, first_row, R, NEGATIVES, BLOCK_R)
    valid_mask_rows = tl.minimum(mask_rows, n - 1)
    rows, valid_rows = first_row + mask_rows, first_row + valid_mask_rows
    start, count = tl.load(starts_ptr + item), tl.load(counts_ptr + item)
    d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    if RESIDENT:
        x_rows = tl.load(x_ptr + valid_rows.to(tl.int64)[None, :] * D + d[:, None])
    lse_i = tl.load(lse_ptr + valid_rows)[None, :]
    gl_i = tl.load(grad_lse_ptr + valid_rows)[None, :]
    gp_i = tl.load(grad_pos_ptr + valid_rows)[None, :]
    ge_i = tl.load(grad_ext_ptr + valid_rows)[None, :]
    acc = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    for tile in range(0, tl.cdiv(tl.abs(count), BLOCK_C)):
        cols, there = tile_columns(columns_ptr, start, count, tile, BLOCK_C)
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


def grad(x: Tensor, masks: Masks, temperature: float, tables: list[Tensor], out_scale: Tensor) -> Tensor:
    """out_scale sum_j (G_ij + G_ji) x_j in x's dtype, stream by stream to bound the scratch.

    tables: lse in base 2 and the three row gradients, (S, N).
    """
    of_pairs, of_rows, of_columns = (
        tuning.lookup(f"contrastive_{op}_sparse", x.dtype, x.shape[2], x.shape[1], x.device)
        for op in ("grad", "rows", "columns")
    )
    n, first_row, negatives = masks.anchors, masks.first_row, masks.negatives
    out = x.new_empty(x.shape[0], n, x.shape[2])
    x = padded_rows(x, max(config["BLOCK_D"] for config in (of_pairs, of_rows, of_columns)))
    streams, total, d = x.shape
    period, width, bits = masks.period(total), masks.positives.stride(0), masks.filled()
    scale = LOG2E / temperature
    kinds = dict(
        SYMMETRIC_POSITIVES=masks.positives_t is None, HAS_EXTRA=masks.extra is not None,
        SYMMETRIC_EXTRA=masks.extra_t is None, HAS_NEGATIVES=negatives is not None, PRECISION=precision(x.dtype),
    )  # fmt: skip

    def listed(s: int, lists: Lists, blocks: int, scaling: Tensor, into: Tensor, **config) -> None:
        _contrastive_listed_grad_kernel[(lists.number, blocks, d // config["BLOCK_D"])](
            x[s], *bits, *lists.arguments(), *(table[s] for table in tables), scaling,
            into, into.shape[1], first_row, n, total, d, period, width, scale, **kinds, **config,
        )  # fmt: skip

    with on_device(x):
        if negatives is None:
            of_positives = positive_lists(total, *masks[:4])
            for s in range(streams):
                listed(s, of_positives, 1, out_scale, out[s], NEGATIVES=False, ADD=False, BLOCK_R=PANEL, **of_pairs)
            return out
        of_negatives = negative_lists(negatives, total)
        side = ColumnSide(masks, of_negatives, total, d, x.dtype, of_columns)
        partial = torch.empty((n, d), dtype=torch.float32, device=x.device)
        one = torch.ones_like(out_scale)
        blocks = triton.cdiv(triton.cdiv(n, period), of_rows["BLOCK_R"])
        for s in range(streams):
            # Their lists make way for the column side's workspace, and are made again for the next stream.
            listed(
                s,
                positive_lists(total, *masks[:4]),
                1,
                one,
                partial,
                NEGATIVES=False,
                ADD=False,
                BLOCK_R=PANEL,
                **of_pairs,
            )
            listed(s, of_negatives, blocks, one, partial, NEGATIVES=True, ADD=True, **of_rows)
            side.add(x[s], tables[0][s], tables[1][s], scale, partial, out_scale, out[s])
    return out
