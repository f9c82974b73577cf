"""What the tests of the searches draw, and the definitions that they compare with."""

from __future__ import annotations

import numpy as np
import torch


def unit_rows(rows, columns, dtype=torch.float32, seed=0):
    x = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1000 * rows))
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


def whole(rows, columns, dtype=torch.float32):
    """Small integers: sums are exact in any order, and many are equal."""
    return torch.randint(-2, 3, (rows, columns)).to(dtype)


def unpack(bits, columns):
    dense = np.unpackbits(bits.numpy().view(np.uint8).reshape(len(bits), 4 * bits.shape[1]), axis=1, bitorder="little")
    assert not dense[:, columns:].any(), "padding bits must be zero"
    return torch.from_numpy(dense[:, :columns].astype(bool))


def band(dtype, columns):
    """Values and decisions may differ by 4 eps sqrt(D); products of 16-bit numbers are summed in fp32."""
    return 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * columns**0.5


def canonical(kernels, queries, keys):
    """All s_ij as the ops see them: each key's values from a search for all M largest."""
    values, indices = kernels.topk_similarity(queries, keys, len(keys), False, None, None)
    return torch.empty_like(values).scatter_(1, indices, values)


def limits(s, thresholds, key_thresholds):
    """min(t_i, t_j) of each pair, or t_i."""
    rows = thresholds.double()[:, None].expand_as(s)
    return (
        rows
        if key_thresholds is None
        else torch.where(rows.isnan() | key_thresholds.isnan(), torch.nan, torch.minimum(rows, key_thresholds.double()))
    )


def topk(s, k, exclude_self=False, query_groups=None, key_groups=None):
    """Of all products: descending, equal ones by index, missing places -inf and -1."""
    s = s.double().clone()
    if exclude_self:
        s.diagonal().fill_(-torch.inf)
    if query_groups is not None:
        s.masked_fill_(query_groups[:, None] != key_groups, -torch.inf)
    values, indices = s.sort(dim=1, descending=True, stable=True)
    return values[:, :k].float(), indices[:, :k].masked_fill(values[:, :k] == -torch.inf, -1)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
