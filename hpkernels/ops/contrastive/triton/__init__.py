"""Masked contrastive statistics and their gradient in Triton: the choice between sweeping all tiles and walking lists.

`kernels_dense` and `kernels_dense_grad` sweep every tile of the pairs; `kernels_sparse` visits only listed columns:
those that a row of the negatives names, and those where a panel of rows has any positive. Both return the same pieces,
which are put together here. `kernels_groups` has the denominator by groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.triton import require_supported
from hpkernels.ops.contrastive.triton import dense as kernels_dense
from hpkernels.ops.contrastive.triton import dense_grad as kernels_dense_grad
from hpkernels.ops.contrastive.triton import sparse as kernels_sparse


def contrastive_stats(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse_i = log sum_{j in E_i} exp(l_ij) (0 for an empty E_i), pos_i = sum_j P_ij l_ij, ext_i = sum_j Q_ij l_ij.

    x (S, N, D) of unit rows; results (S, n) fp32 for the n anchors i = first_row + r, whose pairs are row r of the
    masks. The sums of exponentials come in parts (splits of the columns, or negatives and positives apart), each with
    the base-2 shift it was taken with.
    """
    require_supported(x=x)
    x = x.contiguous()
    route = kernels_sparse if denominator == "sparse" else kernels_dense
    fixed_shift = common.has_fixed_shift(temperature)
    masks = _contiguous(positives, extra, negatives)
    shape = (x.shape[0], positives.shape[0])
    if 0 in shape:
        return tuple(torch.zeros(shape, dtype=torch.float32, device=x.device) for _ in range(3))
    return common.merged(*route.stats(x, *masks, denominator == "all", temperature, first_row, fixed_shift))


def contrastive_grad(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    first_row: int,
    lse: Tensor,
    grad_lse: Tensor,
    grad_pos: Tensor,
    grad_ext: Tensor,
) -> Tensor:
    """dL/dx_i = (1/temperature) sum_j (G_ij + G_ji) x_j,  G_ij = grad_lse_i p_ij + grad_pos_i P_ij + grad_ext_i Q_ij.

    p_ij = E_ij exp(l_ij - lse_i). (S, n, D) in x's dtype for the n anchors from first_row on, accumulated in fp32; lse
    and the row gradients cover all N rows, (S, N). G is rounded to x's dtype for the matrix units; for fp16, whose
    range is short, the row gradients are first scaled by a power of two, undone in fp32.
    """
    require_supported(x=x)
    x = x.contiguous()
    if x.numel() == 0 or positives.shape[0] == 0:
        return x.new_empty(x.shape[0], positives.shape[0], x.shape[2])
    gradients, out_scale = common.scaled_gradients(x.dtype, temperature, (grad_lse, grad_pos, grad_ext))
    route = kernels_sparse if denominator == "sparse" else kernels_dense_grad
    masks = _contiguous(positives, positives_t, extra, extra_t, negatives)
    lse2 = (lse.float() * common.LOG2E).contiguous()
    return route.grad(x, *masks, denominator == "all", temperature, first_row, lse2, *gradients, out_scale)


def _contiguous(*masks: Tensor | None) -> list[Tensor | None]:
    return [None if mask is None else mask.contiguous() for mask in masks]
