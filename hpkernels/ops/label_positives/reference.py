"""The positive terms of label losses in N x M form: the specification, differentiable any number of times.

P_ij = [c_i >= 0][c_i = d_j][g_i != h_j] for classes c, d and groups g, h of rows and keys; without groups every row is
a group of its own, and no key is in it (keys None: the rows themselves are the keys, so j = i is left out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.label_positives.rows import Labelled


def positives(classes: Tensor, groups: Tensor | None, key_classes: Tensor | None, key_groups: Tensor | None) -> Tensor:
    """P, bool (N, M)."""
    same = (classes >= 0)[:, None] & (classes[:, None] == (classes if key_classes is None else key_classes))
    if groups is not None:
        return same & (groups[:, None] != (groups if key_classes is None else key_groups))
    return same if key_classes is not None else same & ~torch.eye(len(classes), dtype=torch.bool, device=classes.device)


def _logits(x: Tensor, keys: Tensor | None, temperature: float) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        return x @ (x if keys is None else keys.to(x.dtype)).T / temperature


def _mean(P: Tensor, values: Tensor) -> Tensor:
    return torch.where(P, values, 0.0).sum(1) / P.sum(1).clamp_min(1)


def logit_mean(rows: Labelled, temperature: float) -> Tensor:
    """(1 / |P_i|) sum_j P_ij l_ij, l_ij = <x_i, k_j> / temperature; 0 without positives. (N,)."""
    P = positives(rows.classes, rows.groups, rows.key_classes, rows.key_groups)
    return _mean(P, _logits(rows.x, rows.keys, temperature))


def softplus_mean(rows: Labelled, lse: Tensor, temperature: float) -> Tensor:
    """(1 / |P_i|) sum_j P_ij log(1 + exp(lse_i - l_ij)); 0 without positives. (N,)."""
    P = positives(rows.classes, rows.groups, rows.key_classes, rows.key_groups)
    above = torch.where(P, lse[:, None] - _logits(rows.x, rows.keys, temperature), 0.0)
    return _mean(P, torch.logaddexp(above, torch.zeros_like(above)))
