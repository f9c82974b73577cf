"""The gradient of the dense denominator: every tile of the pairs, by one of two routes.

    fused       a row panel owns its output: the tile of x_j is loaded once for both products, z = x_i x_j^T and
                dX_i += (G + G^T) x_j. Nothing of size N x N is stored.
    workspace   a kernel writes W = G + G^T for a block of anchors (rows x N, x's dtype, at most 216 MiB), and a library
                product makes the block's gradient of it in one piece: no sum is carried from block to block.

Which one is the tuning table's choice. Both accumulate in fp32 and round W to x's dtype. Logits are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.gpu import LOG2E, padded_rows
from hpkernels.ops.common.triton import bit_tile, on_device, precision, tile_product, turned_bit_tile
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.workspace import grad_by_workspace, uses_workspace


@triton.jit
def _pair_weights(
    z, rows, valid_rows, mask_rows, first_anchor, cols, valid_cols, first_word,
    positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
    lse_ptr, factor_ptr, grad_pos_ptr, grad_ext_ptr, N, R, W, shift,
    ALL: tl.constexpr, SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, SHARED_EXPONENTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N]: G_ij + G_ji for logits z, 0 on the diagonal and beyond the last column.

    With SHARED_EXPONENTIAL factor_i = grad_lse_i exp2(shift - lse_i), so that one exponential serves both directions;
    else factor_i = grad_lse_i and each direction takes its own.
    """
    positive = bit_tile(positives_ptr, mask_rows, first_word, W, BLOCK_M, BLOCK_N)
    positive_t = positive
    if not SYMMETRIC_POSITIVES:
        positive_t = bit_tile(positives_t_ptr, mask_rows, first_word, W, BLOCK_M, BLOCK_N)
    inside, inside_t = positive, positive_t
    if HAS_NEGATIVES:
        inside |= bit_tile(negatives_ptr, valid_rows % R, first_word, W, BLOCK_M, BLOCK_N)
        inside_t |= turned_bit_tile(negatives_ptr, valid_cols % R, first_anchor // 32, W, BLOCK_M, BLOCK_N)
    factor_i = tl.load(factor_ptr + valid_rows)[:, None]
    factor_j = tl.load(factor_ptr + valid_cols)[None, :]
    if SHARED_EXPONENTIAL:
        if ALL:
            weight = (factor_i + factor_j) * tl.exp2(z - shift)
        else:
            weight = (tl.where(inside, factor_i, 0.0) + tl.where(inside_t, factor_j, 0.0)) * tl.exp2(z - shift)
    else:
        row_part = factor_i * tl.exp2(z - tl.load(lse_ptr + valid_rows)[:, None])
        column_part = factor_j * tl.exp2(z - tl.load(lse_ptr + valid_cols)[None, :])
        if ALL:
            weight = row_part + column_part
        else:
            weight = tl.where(inside, row_part, 0.0) + tl.where(inside_t, column_part, 0.0)
    weight += tl.where(positive, tl.load(grad_pos_ptr + valid_rows)[:, None], 0.0)
    weight += tl.where(positive_t, tl.load(grad_pos_ptr + valid_cols)[None, :], 0.0)
    if HAS_EXTRA:
        also = bit_tile(extra_ptr, mask_rows, first_word, W, BLOCK_M, BLOCK_N)
        also_t = also
        if not SYMMETRIC_EXTRA:
            also_t = bit_tile(extra_t_ptr, mask_rows, first_word, W, BLOCK_M, BLOCK_N)
        weight += tl.where(also, tl.load(grad_ext_ptr + valid_rows)[:, None], 0.0)
        weight += tl.where(also_t, tl.load(grad_ext_ptr + valid_cols)[None, :], 0.0)
    return tl.where((rows[:, None] != cols[None, :]) & (cols < N)[None, :], weight, 0.0)


@triton.jit
def _contrastive_grad_kernel(
    x_ptr, positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
    lse_ptr, factor_ptr, grad_pos_ptr, grad_ext_ptr, out_scale_ptr, out_ptr,
    first_row, n, N, D, D_out, R, W, scale, shift,
    ALL: tl.constexpr, SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, SHARED_EXPONENTIAL: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = out_scale sum_j (G_ij + G_ji) x_j for a panel of BLOCK_M rows and BLOCK_D columns of x.

    Panels start at whole words of columns (the negatives' bits of the other side are read along the anchors), so the
    first may reach before first_row.
    """
    first_anchor = first_row // 32 * 32 + tl.program_id(0) * BLOCK_M
    rows = first_anchor + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    stream = tl.program_id(2).to(tl.int64)
    x_ptr += stream.to(tl.int64) * N * D
    lse_ptr += stream * N
    factor_ptr += stream * N
    grad_pos_ptr += stream * N
    grad_ext_ptr += stream * N
    mask_rows = tl.minimum(tl.maximum(rows - first_row, 0), n - 1)
    valid_rows = first_row + mask_rows
    if RESIDENT:
        x_rows = tl.load(x_ptr + valid_rows.to(tl.int64)[:, None] * D + d[None, :])
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(0, tl.cdiv(N, BLOCK_N)):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_cols = tl.minimum(cols, N - 1)
        x_cols = tl.load(x_ptr + valid_cols.to(tl.int64)[:, None] * D + d[None, :])
        if RESIDENT:
            z = tl.dot(x_rows, tl.trans(x_cols), input_precision=PRECISION)
        else:
            z = tile_product(x_ptr, x_ptr, valid_rows, valid_cols, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        weight = _pair_weights(
            z * scale, rows, valid_rows, mask_rows, first_anchor, cols, valid_cols, tile * (BLOCK_N // 32),
            positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
            lse_ptr, factor_ptr, grad_pos_ptr, grad_ext_ptr, N, R, W, shift,
            ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, SHARED_EXPONENTIAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc = tl.dot(weight.to(x_cols.dtype), x_cols, acc, input_precision=PRECISION)
    out_rows = rows - first_row
    out_at = (stream.to(tl.int64) * n + out_rows)[:, None] * D_out + d[None, :]
    out = (acc * tl.load(out_scale_ptr)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at, out, mask=((out_rows >= 0) & (out_rows < n))[:, None] & (d < D_out)[None, :])


@triton.jit
def _write_weights(
    z, tile_rows, first_anchor, first_col,
    positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
    lse_ptr, factor_ptr, grad_pos_ptr, grad_ext_ptr, out_ptr,
    block_row, block_rows, first_row, n, N, R, W, W_out, shift,
    ALL: tl.constexpr, SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, SHARED_EXPONENTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of logits, 32 columns at a time: masked values of more do not fit in registers beside it."""
    if BLOCK_N > 32:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(z, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        _write_weights(
            left, tile_rows, first_anchor, first_col,
            positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, lse_ptr, factor_ptr, grad_pos_ptr,
            grad_ext_ptr, out_ptr, block_row, block_rows, first_row, n, N, R, W, W_out, shift,
            ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, SHARED_EXPONENTIAL, BLOCK_M, HALF,
        )  # fmt: skip
        _write_weights(
            right, tile_rows, first_anchor, first_col + HALF,
            positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, lse_ptr, factor_ptr, grad_pos_ptr,
            grad_ext_ptr, out_ptr, block_row, block_rows, first_row, n, N, R, W, W_out, shift,
            ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, SHARED_EXPONENTIAL, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        rows = block_row + tile_rows
        mask_rows = tl.minimum(tl.maximum(rows - first_row, 0), n - 1)
        cols = first_col + tl.arange(0, BLOCK_N)
        weight = _pair_weights(
            z, rows, first_row + mask_rows, mask_rows, first_anchor, cols, tl.minimum(cols, N - 1), first_col // 32,
            positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
            lse_ptr, factor_ptr, grad_pos_ptr, grad_ext_ptr, N, R, W, shift,
            ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, SHARED_EXPONENTIAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        out_at = tile_rows.to(tl.int64)[:, None] * W_out + cols[None, :]
        mask = (tile_rows < block_rows)[:, None] & (cols < W_out)[None, :]
        tl.store(out_ptr + out_at, weight.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _contrastive_weights_kernel(
    x_ptr, positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr,
    lse_ptr, factor_ptr, grad_pos_ptr, grad_ext_ptr, out_ptr,
    block_row, block_rows, first_row, n, N, D, R, W, W_out, scale, shift,
    ALL: tl.constexpr, SYMMETRIC_POSITIVES: tl.constexpr, HAS_EXTRA: tl.constexpr, SYMMETRIC_EXTRA: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr, SHARED_EXPONENTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[r, j] = G_ij + G_ji, i = block_row + r (a multiple of 32), rounded to x's dtype; one stream, one tile.

    Rows outside the anchors repeat the nearest anchor's pairs; the caller leaves them out.
    """
    tile_rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(tl.maximum(block_row + tile_rows - first_row, 0), n - 1) + first_row
    first_col = tl.program_id(0) * BLOCK_N
    cols = tl.minimum(first_col + tl.arange(0, BLOCK_N), N - 1)
    z = tile_product(x_ptr, x_ptr, rows, cols, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    _write_weights(
        z * scale, tile_rows, block_row + tl.program_id(1) * BLOCK_M, first_col,
        positives_ptr, positives_t_ptr, extra_ptr, extra_t_ptr, negatives_ptr, lse_ptr, factor_ptr, grad_pos_ptr,
        grad_ext_ptr, out_ptr, block_row, block_rows, first_row, n, N, R, W, W_out, shift,
        ALL, SYMMETRIC_POSITIVES, HAS_EXTRA, SYMMETRIC_EXTRA, HAS_NEGATIVES, SHARED_EXPONENTIAL, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def grad(x: Tensor, masks: Masks, temperature: float, tables: list[Tensor], out_scale: Tensor) -> Tensor:
    """out_scale sum_j (G_ij + G_ji) x_j in x's dtype, (S, n, D); tables: lse in base 2 and the row gradients."""
    lse2, grad_lse, *others = tables
    shared, factor = common.shared_exponential(temperature, lse2, grad_lse)
    choices = dict(
        ALL=masks.everything, SYMMETRIC_POSITIVES=masks.positives_t is None, HAS_EXTRA=masks.extra is not None,
        SYMMETRIC_EXTRA=masks.extra_t is None, HAS_NEGATIVES=masks.negatives is not None, SHARED_EXPONENTIAL=shared,
        PRECISION=precision(x.dtype),
    )  # fmt: skip
    key = (x.dtype, x.shape[2], x.shape[1], x.device)
    route = _grad_by_workspace if uses_workspace(*key) else _grad_fused
    return route(x, masks, LOG2E / temperature, [lse2, factor, *others], out_scale, choices, key)


def _grad_fused(
    x: Tensor, masks: Masks, shift: float, tables: list[Tensor], out_scale: Tensor, choices: dict, key: tuple
) -> Tensor:
    config = tuning.lookup("contrastive_grad_fused", *key)
    n, bits = masks.anchors, masks.filled()
    out = x.new_empty(x.shape[0], n, x.shape[2])
    x = padded_rows(x, config["BLOCK_D"])
    streams, total, d = x.shape
    grid = (triton.cdiv(masks.first_row % 32 + n, config["BLOCK_M"]), triton.cdiv(d, config["BLOCK_D"]), streams)
    with on_device(x):
        _contrastive_grad_kernel[grid](
            x, *bits, *tables, out_scale, out, masks.first_row, n, total, d, out.shape[2],
            masks.period(total), bits[0].stride(0), shift, shift, **choices, **config,
        )  # fmt: skip
    return out


def _grad_by_workspace(
    x: Tensor, masks: Masks, shift: float, tables: list[Tensor], out_scale: Tensor, choices: dict, key: tuple
) -> Tensor:
    config = tuning.lookup("contrastive_grad_workspace", *key)
    n, first_row, bits = masks.anchors, masks.first_row, masks.filled()
    padded = padded_rows(x, config["BLOCK_K"])
    _, total, d = padded.shape

    def write_weights(s: int, block_row: int, block_rows: int, workspace: Tensor) -> None:
        grid = (triton.cdiv(total, config["BLOCK_N"]), triton.cdiv(block_rows, config["BLOCK_M"]))
        with on_device(x):
            _contrastive_weights_kernel[grid](
                padded[s], *bits, *[table[s] for table in tables], workspace,
                block_row, block_rows, first_row, n, total, d,
                masks.period(total), bits[0].stride(0), workspace.stride(0), shift, shift, **choices, **config,
            )  # fmt: skip

    return grad_by_workspace(x, first_row, n, out_scale, 32, config["BLOCK_M"], write_weights)
