"""Inner-product search over all pairs, in plain torch, row block by row block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpkernels.common.bits import pack

_BLOCK_PAIRS = 1 << 25  # similarities alive at a time


def promoted(*operands: Tensor | None) -> list[Tensor | None]:
    """16-bit operands to fp32, each exactly; everything to fp64 as soon as one operand is fp64."""
    given = [x for x in operands if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    return [None if x is None else x.to(dtype) for x in operands]


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of queries @ keys.T, never in reduced precision."""
    step = max(1, _BLOCK_PAIRS // max(1, keys.shape[0]))
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, queries.shape[0], step):
            rows = slice(start, start + step)
            yield rows, queries[rows] @ keys.T


def max_similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """max_k <q_i, key_k>, (N,)."""
    queries, keys = promoted(queries, keys)
    best = [s.amax(1) for _, s in _blocks(queries, keys)]
    return torch.cat(best) if best else queries.new_empty(0)


def topk_similarity(
    queries: Tensor, keys: Tensor, k: int, exclude_self: bool, query_groups: Tensor | None, key_groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k largest products of each row, descending, exact ties to the lower index; missing places -inf and -1."""
    queries, keys = promoted(queries, keys)
    values = queries.new_empty((queries.shape[0], k), dtype=torch.float32)
    indices = torch.empty((queries.shape[0], k), dtype=torch.int64, device=queries.device)
    for rows, s in _blocks(queries, keys):
        if exclude_self:
            s.diagonal(rows.start).fill_(-torch.inf)
        if query_groups is not None:
            s.masked_fill_(query_groups[rows, None] != key_groups, -torch.inf)
        top, where = s.sort(dim=1, descending=True, stable=True)  # stable: equal values keep the lower index first
        top, where = top[:, :k], where[:, :k]
        values[rows] = top.float()
        indices[rows] = torch.where(top == -torch.inf, -1, where)
    return values, indices


def pairs_above(x: Tensor, thresholds: Tensor, keys: Tensor | None, key_thresholds: Tensor | None) -> Tensor:
    """Bits of s_ij > min(t_i, t_j), i != j, decided in the upper triangle (keys None), or of s_ij > min(t_i, kt_j)."""
    x, thresholds, keys, key_thresholds = promoted(x, thresholds, keys, key_thresholds)
    if keys is None:
        keys, key_thresholds = x, thresholds
        symmetric = True
    else:
        symmetric = False
    dense = torch.zeros(x.shape[0], keys.shape[0], dtype=torch.bool, device=x.device)
    for rows, s in _blocks(x, keys):
        theta = thresholds[rows, None]
        if key_thresholds is not None:
            theta = torch.minimum(theta, key_thresholds)
        dense[rows] = s > theta
    if symmetric:
        dense = dense.triu(1)
        dense = dense | dense.T
    return pack(dense)
