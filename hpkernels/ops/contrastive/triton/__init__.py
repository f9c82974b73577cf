"""Masked contrastive statistics and their gradient in Triton: the choice between sweeping all tiles and walking lists.

`dense` and `dense_grad` sweep every tile of the pairs; `sparse` and `sparse_grad` visit only listed columns: those that
a row of the negatives names, and those where a panel of rows has any positive. Both return the same pieces, which are
put together here. The op group_lse has the denominator by groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.gpu import LOG2E
from hpkernels.ops.common.triton import merged, require_supported
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.triton import dense, dense_grad, sparse, sparse_grad


def contrastive_stats(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse_i = log sum_{j in E_i} exp(l_ij) (0 for an empty E_i), pos_i = sum_j P_ij l_ij, ext_i = sum_j Q_ij l_ij.

    x (S, N, D) of unit rows; results (S, n) fp32 for the n anchors of the masks. The sums of exponentials come in parts
    (splits of the columns, or negatives and positives apart), each with the base-2 shift it was taken with.
    """
    require_supported(x=x)
    shape = (x.shape[0], masks.anchors)
    if 0 in shape:
        return tuple(torch.zeros(shape, dtype=torch.float32, device=x.device) for _ in range(3))
    route = sparse if masks.denominator == "sparse" else dense
    return merged(*route.stats(x.contiguous(), masks.map(Tensor.contiguous), temperature))


def contrastive_grad(
    x: Tensor, masks: Masks, temperature: float, lse: Tensor, grad_lse: Tensor, grad_pos: Tensor, grad_ext: Tensor
) -> Tensor:
    """The gradient (S, n, D) of the anchors' rows in x's dtype, accumulated in fp32; see reference.py.

    G is rounded to x's dtype for the matrix units, the row gradients scaled before as `scaled_gradients` says.
    """
    require_supported(x=x)
    if x.numel() == 0 or masks.anchors == 0:
        return x.new_empty(x.shape[0], masks.anchors, x.shape[2])
    gradients, out_scale = common.scaled_gradients(x.dtype, temperature, (grad_lse, grad_pos, grad_ext))
    tables = [(lse.float() * LOG2E).contiguous(), *gradients]
    route = sparse_grad if masks.denominator == "sparse" else dense_grad
    return route.grad(x.contiguous(), masks.map(Tensor.contiguous), temperature, tables, out_scale)
