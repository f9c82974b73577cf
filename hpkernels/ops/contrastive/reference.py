"""The statistics of a masked contrastive loss as their equations read, N x N and all: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.common.bits import unpack
from hpkernels.ops.contrastive.masks import Masks


def _pairs(bits: Tensor | None, total: int, first_row: int) -> Tensor | None:
    """bool (n, N): the pairs of the anchors first_row + r, without the diagonal."""
    if bits is None:
        return None
    pairs = unpack(bits, total)
    return pairs & _others(len(pairs), total, first_row, pairs.device)


def _others(n: int, total: int, first_row: int, device: torch.device) -> Tensor:
    """bool (n, N): j != i."""
    anchors = torch.arange(first_row, first_row + n, device=device)
    return anchors[:, None] != torch.arange(total, device=device)


def _denominator(P: Tensor, masks: Masks, turned: bool = False) -> Tensor:
    """E_ij, bool (n, N), or turned E_ji: every j != i, or P and the negatives' row i mod R (turned: j mod R)."""
    n, total = P.shape
    others = _others(n, total, masks.first_row, P.device)
    if masks.everything:
        return others
    if masks.negatives is None:
        return P
    rows = unpack(masks.negatives, total).repeat(total // max(1, masks.period(total)), 1)
    return (P | (rows.T if turned else rows)[masks.first_row : masks.first_row + n]) & others


def contrastive_stats(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse_i = log sum_{j in E_i} exp(l_ij) (0 for an empty E_i), pos_i = sum_j P_ij l_ij, ext_i = sum_j Q_ij l_ij.

    l_ij = <x_i, x_j> / temperature for each stream of x (S, N, D) and the n anchors of the masks; all results (S, n),
    fp32 (fp64 for fp64).
    """
    n, total, first_row = masks.anchors, x.shape[1], masks.first_row
    x = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        logits = x[:, first_row : first_row + n] @ x.transpose(1, 2) / temperature
    P, Q = _pairs(masks.positives, total, first_row), _pairs(masks.extra, total, first_row)
    E = _denominator(P, masks)
    empty = ~E.any(1)
    inside = torch.where(E, logits, -torch.inf)
    inside = torch.where(empty[:, None], 0.0, inside)  # a finite row instead of one of -inf only: no NaN gradients
    lse = torch.where(empty, 0.0, torch.logsumexp(inside, 2) if total else x.new_zeros(x.shape[0], n))
    pos = torch.where(P, logits, 0.0).sum(2)
    ext = torch.where(Q, logits, 0.0).sum(2) if Q is not None else torch.zeros_like(pos)
    return lse, pos, ext


def contrastive_grad(
    x: Tensor, masks: Masks, temperature: float, lse: Tensor, grad_lse: Tensor, grad_pos: Tensor, grad_ext: Tensor
) -> Tensor:
    """dL/dx_i = (1/temperature) sum_j (G_ij + G_ji) x_j,  G_ij = grad_lse_i p_ij + grad_pos_i P_ij + grad_ext_i Q_ij,

    p_ij = E_ij exp(l_ij - lse_i). lse and the row gradients cover all rows, (S, N); the result the n anchors from
    first_row on, (S, n, D) in x's dtype.
    """
    total, dtype, first_row = x.shape[1], x.dtype, masks.first_row
    anchors = slice(first_row, first_row + masks.anchors)
    x = x if dtype == torch.float64 else x.float()
    P, Q = _pairs(masks.positives, total, first_row), _pairs(masks.extra, total, first_row)
    P_t = P if masks.positives_t is None else _pairs(masks.positives_t, total, first_row)
    Q_t = Q if masks.extra_t is None else _pairs(masks.extra_t, total, first_row)
    E, E_t = _denominator(P, masks), _denominator(P_t, masks, turned=True)
    with torch.autocast(x.device.type, enabled=False):
        logits = x[:, anchors] @ x.transpose(1, 2) / temperature
        p = torch.where(E, torch.exp(logits - lse[:, anchors, None]), 0.0)
        p_t = torch.where(E_t, torch.exp(logits - lse[:, None]), 0.0)
        G = grad_lse[:, anchors, None] * p + grad_lse[:, None] * p_t
        G = G + grad_pos[:, anchors, None] * P + grad_pos[:, None] * P_t
        if Q is not None:
            G = G + grad_ext[:, anchors, None] * Q + grad_ext[:, None] * Q_t
        return (G @ x / temperature).to(dtype)
