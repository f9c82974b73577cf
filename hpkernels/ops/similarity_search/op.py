"""The search ops over all pairs of two sets of vectors; `hpkernels.search` has the functions that check what they get.

No backend but the reference stores an N x M matrix of floats; pairs come out as bits. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.bits import words
from hpkernels.common.checks import check_finite, check_no_nan


def _refuse_non_finite(
    backend: str, thresholds: Tensor | None = None, key_thresholds: Tensor | None = None, **vectors: Tensor | None
) -> None:
    """Thresholds may be infinite, and are no vectors that the C++ kernels look at while they pack them."""
    for name, x in (("thresholds", thresholds), ("key_thresholds", key_thresholds)):
        if x is not None:
            check_no_nan(name, x)
    for name, x in vectors.items():
        if x is not None and backend != "cpu":
            check_finite(name, x)


@torch.library.custom_op("hpkernels::max_similarity", mutates_args=())
def max_similarity(queries: Tensor, keys: Tensor, backend: str) -> Tensor:
    _refuse_non_finite(backend, queries=queries, keys=keys)
    return dispatch.function("similarity_search", "max_similarity", backend, queries)(queries, keys)


@max_similarity.register_fake
def _(queries, keys, backend):
    return torch.empty(queries.shape[:1], dtype=_accumulator(queries, keys), device=queries.device)


@torch.library.custom_op("hpkernels::topk_similarity", mutates_args=())
def topk_similarity(
    queries: Tensor,
    keys: Tensor,
    k: int,
    exclude_self: bool,
    query_groups: Tensor | None,
    key_groups: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _refuse_non_finite(backend, queries=queries, keys=keys)
    search = dispatch.function("similarity_search", "topk_similarity", backend, queries)
    return search(queries, keys, k, exclude_self, query_groups, key_groups)


@topk_similarity.register_fake
def _(queries, keys, k, exclude_self, query_groups, key_groups, backend):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("hpkernels::pairs_above", mutates_args=())
def pairs_above(
    x: Tensor, thresholds: Tensor, keys: Tensor | None, key_thresholds: Tensor | None, backend: str
) -> Tensor:
    _refuse_non_finite(backend, thresholds, key_thresholds, x=x, keys=keys)
    search = dispatch.function("similarity_search", "pairs_above", backend, x)
    return search(x, thresholds, keys, key_thresholds)


@pairs_above.register_fake
def _(x, thresholds, keys, key_thresholds, backend):
    columns = x.shape[0] if keys is None else keys.shape[0]
    return torch.empty((x.shape[0], words(columns)), dtype=torch.int32, device=x.device)


def _accumulator(*operands: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32
