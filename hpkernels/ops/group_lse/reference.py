"""The log-sum-exp over other groups as its equation reads, N x M and all: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.group_lse.rows import Grouped


def _other_groups(groups: Tensor, key_groups: Tensor) -> Tensor:
    """E_ij = [g_i >= 0][h_j >= 0][g_i != h_j], bool (N, M)."""
    return (groups >= 0)[:, None] & (key_groups >= 0) & (groups[:, None] != key_groups)


def group_lse(rows: Grouped, temperature: float) -> Tensor:
    """log sum_j E_ij exp(<x_i, k_j> / temperature), (N,); 0 for an empty E_i. Keys None: the rows themselves."""
    x, groups, keys, key_groups = rows
    E = _other_groups(groups, groups if keys is None else key_groups)
    x = x if x.dtype == torch.float64 else x.float()
    keys = x if keys is None else keys.to(x.dtype)
    if E.shape[1] == 0:
        return x.sum(1) * 0.0
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ keys.T / temperature
    empty = ~E.any(1)
    inside = torch.where(empty[:, None], 0.0, torch.where(E, logits, -torch.inf))
    return torch.where(empty, 0.0, torch.logsumexp(inside, 1))


def group_lse_grad(rows: Grouped, temperature: float, lse: Tensor, grad_lse: Tensor, of_keys: bool) -> Tensor:
    """With G_ij = grad_lse_i E_ij exp(l_ij - lse_i): sum_j G_ij k_j / temperature, or of_keys sum_i G_ij x_i /
    temperature; without keys the sum of both. In x's (the keys') dtype."""
    x, groups, keys, key_groups = rows
    dtype = keys.dtype if of_keys else x.dtype
    E = _other_groups(groups, groups if keys is None else key_groups)
    x = x if x.dtype == torch.float64 else x.float()
    columns = x if keys is None else keys.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        G = grad_lse[:, None] * torch.where(E, torch.exp(x @ columns.T / temperature - lse[:, None]), 0.0)
        if keys is None:
            return ((G + G.T) @ x / temperature).to(dtype)
        return ((G.T @ x if of_keys else G @ columns) / temperature).to(dtype)
