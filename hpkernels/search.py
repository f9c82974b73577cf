"""Search over all pairs of two sets of vectors by inner product: max_similarity, topk_similarity, pairs_above.

No backend but the reference stores an N x M matrix of floats; pairs come out as bits. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import (
    check_columns,
    check_flag,
    check_float_tensor,
    check_int,
    check_int_tensor,
    describe,
)
from hpkernels.ops.similarity_search import op
from hpkernels.pairs import PairMask


def max_similarity(queries: Tensor, keys: Tensor, *, backend: str | None = None) -> Tensor:
    """Largest inner product of each query with any key: values_i = max_k <queries_i, keys_k>.

    Args:
        queries: (N, C), any floating dtype, taken as given (not normalised). 16-bit operands are read as fp32.
        keys: (M, C), M >= 1, on the same device.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        (N,) float32 (float64 when an operand is float64). No gradient.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite input on the CPU.
    """
    _check_operands("queries", queries, "keys", keys)
    if keys.shape[0] == 0:
        raise ValueError(f"keys: expected at least one row, got {describe(keys)}")
    chosen = dispatch.choose(queries.device, backend, queries, keys)
    return op.max_similarity(queries.detach(), keys.detach(), chosen)


def topk_similarity(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    exclude_self: bool = False,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k keys of largest inner product for each query, exact, in descending order; ties go to the lower index.

    Args:
        queries: (N, C), any floating dtype, taken as given. keys: (M, C) on the same device.
        k: 1 <= k <= M.
        exclude_self: query i never finds key i (queries and keys are the same set).
        query_groups, key_groups: int64 (N,) and (M,); query i searches only keys of its group.

    Returns:
        values float32 (N, k) and indices int64 (N, k). Places without a key hold -inf and -1. No gradient.
    """
    _check_operands("queries", queries, "keys", keys)
    k = check_int("k", k)
    check_flag("exclude_self", exclude_self)
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"k: expected 1 <= k <= {keys.shape[0]} (the number of keys), got {k}")
    if (query_groups is None) != (key_groups is None):
        missing = "query_groups" if query_groups is None else "key_groups"
        raise ValueError(f"{missing}: expected with the other groups argument, got None")
    if query_groups is not None:
        check_groups("query_groups", query_groups, queries)
        check_groups("key_groups", key_groups, keys)
    chosen = dispatch.choose(queries.device, backend, queries, keys)
    return op.topk_similarity(queries.detach(), keys.detach(), k, exclude_self, query_groups, key_groups, chosen)


def pairs_above(
    x: Tensor,
    thresholds: Tensor,
    *,
    keys: Tensor | None = None,
    key_thresholds: Tensor | None = None,
    backend: str | None = None,
) -> PairMask:
    """One bit per pair whose inner product exceeds a threshold.

    Without keys: P_ij = [i != j][ <x_i, x_j> > min(t_i, t_j) ], symmetric, each pair decided once.
    With keys: P_ij = [ <x_i, keys_j> > t_i ], or > min(t_i, key_thresholds_j) if those are given.

    Args:
        x: (N, C), any floating dtype, taken as given (not normalised). thresholds: (N,), infinite ones too.
        keys: (M, C). key_thresholds: (M,), only with keys.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        PairMask of shape (N, N) or (N, M). Decisions on fp32 inputs are those of an IEEE fp32 product.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite input on the CPU.
    """
    check_float_tensor("x", x)
    _check_thresholds("thresholds", thresholds, "x", x)
    if keys is not None:
        _check_operands("x", x, "keys", keys)
    if key_thresholds is not None:
        if keys is None:
            raise ValueError(f"key_thresholds: expected only together with keys, got {describe(key_thresholds)}")
        _check_thresholds("key_thresholds", key_thresholds, "keys", keys)
    detached = [None if t is None else t.detach() for t in (x, thresholds, keys, key_thresholds)]
    bits = op.pairs_above(*detached, dispatch.choose(x.device, backend, *detached))
    return PairMask(bits, x.shape[0] if keys is None else keys.shape[0], symmetric=keys is None)


def _check_operands(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    check_float_tensor(name, x)
    check_float_tensor(other_name, other, like=x)
    check_columns(other_name, other, name, x)


def check_groups(name: str, groups: object, rows: Tensor) -> None:
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {describe(groups)}")
    check_int_tensor(name, groups, rows.shape[:1], rows.device)


def _check_thresholds(name: str, thresholds: Tensor, rows_name: str, rows: Tensor) -> None:
    check_float_tensor(name, thresholds, ndim=1, like=rows)
    if thresholds.shape[0] != rows.shape[0]:
        raise ValueError(f"{name}: expected one per row of {rows_name} ({rows.shape[0]}), got {describe(thresholds)}")
