"""The statistics of a masked contrastive loss as their equations read, N x N and all: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._bits import unpack


def _pairs(bits: Tensor | None, n: int) -> Tensor | None:
    """bool (N, N) without the diagonal."""
    if bits is None:
        return None
    dense = unpack(bits, n)
    return dense & ~torch.eye(n, dtype=torch.bool, device=dense.device)


def _denominator(positives: Tensor, negatives: Tensor | None, denominator: str) -> Tensor:
    """E, bool (N, N): every j != i, or the positives and the columns of the negatives' row i mod R."""
    n = positives.shape[0]
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=positives.device)
    if denominator == "all":
        return off_diagonal
    if negatives is None:
        return positives
    rows = unpack(negatives, n)
    return (positives | rows.repeat(n // max(1, rows.shape[0]), 1)) & off_diagonal


def contrastive_stats(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse_i = log sum_{j in E_i} exp(l_ij) (0 for an empty E_i), pos_i = sum_j P_ij l_ij, ext_i = sum_j Q_ij l_ij.

    l_ij = <x_i, x_j> / temperature for each stream of x (S, N, D); all results (S, N), fp32 (fp64 for fp64).
    """
    n = x.shape[1]
    x = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ x.transpose(1, 2) / temperature
    P, Q = _pairs(positives, n), _pairs(extra, n)
    E = _denominator(P, negatives, denominator)
    empty = ~E.any(1)
    inside = torch.where(E, logits, -torch.inf)
    inside = torch.where(empty[:, None], 0.0, inside)  # a finite row instead of one of -inf only: no NaN gradients
    lse = torch.where(empty, 0.0, torch.logsumexp(inside, 2) if n else x.new_zeros(x.shape[:2]))
    pos = torch.where(P, logits, 0.0).sum(2)
    ext = torch.where(Q, logits, 0.0).sum(2) if Q is not None else torch.zeros_like(pos)
    return lse, pos, ext


def contrastive_grad(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    lse: Tensor,
    grad_lse: Tensor,
    grad_pos: Tensor,
    grad_ext: Tensor,
) -> Tensor:
    """dL/dx_i = (1/temperature) sum_j (G_ij + G_ji) x_j,  G_ij = grad_lse_i p_ij + grad_pos_i P_ij + grad_ext_i Q_ij,

    p_ij = E_ij exp(l_ij - lse_i). Shape and dtype of x.
    """
    n, dtype = x.shape[1], x.dtype
    x = x if dtype == torch.float64 else x.float()
    P, Q = _pairs(positives, n), _pairs(extra, n)
    E = _denominator(P, negatives, denominator)
    with torch.autocast(x.device.type, enabled=False):
        p = torch.where(E, torch.exp(x @ x.transpose(1, 2) / temperature - lse[..., None]), 0.0)
        G = grad_lse[..., None] * p + grad_pos[..., None] * P
        if Q is not None:
            G = G + grad_ext[..., None] * Q
        return ((G + G.transpose(1, 2)) @ x / temperature).to(dtype)
