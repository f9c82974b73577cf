"""Positive pairs found from features (`hidden_positives`): the rules that decide for each pair."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.bits import clear_diagonal
from hpkernels.common.checks import check_columns, check_float_tensor, check_int, describe, plain, witness
from hpkernels.common.ranks import ALONE, Ranks
from hpkernels.ops.normalize.op import normalize_rows
from hpkernels.ops.pair_bits import op as pair_bits
from hpkernels.ops.similarity_search import op as similarity_search
from hpkernels.pairs import PairMask
from hpkernels.search import max_similarity, pairs_above, topk_similarity


def hidden_positives(
    features: Tensor,
    pool: Tensor | None = None,
    *,
    positives_per_anchor: int | None = None,
    backend: str | None = None,
) -> PairMask:
    """Which patches are positives of which (Hidden Positives, CVPR 2023, section 3.2). Rows are normalised inside.

    With a pool: P_ij = [i != j][ <f_i, f_j> > min(R_i, R_j) ], R_i = max_k <f_i, pool_k>: two patches are positives
    when they are closer to each other than one of them is to anything in a pool of reference patches.
    With positives_per_anchor = k: j is one of the k nearest of i, or i one of the k nearest of j.

    Args:
        features: (N, C), any floating dtype. pool: (M, C), M >= 1.
        positives_per_anchor: k, at most N - 1. Exactly one of pool and positives_per_anchor.

    Returns:
        Symmetric PairMask (N, N) without a diagonal. No gradient.
    """
    graph = Graph("features", features, "pool", pool, plain(positives_per_anchor))
    check_graph(graph)
    return find_rule(graph, dispatch.choose(features.device, backend, features, pool)).mask()


class Graph(NamedTuple):
    """What positive pairs are found from, by the caller's names: features (N, C), and a pool (M, C) or a number k."""

    name: str
    features: Tensor
    pool_name: str
    pool: Tensor | None
    neighbors: int | None  # k

    def inputs(self) -> tuple[tuple[str, Tensor | None], ...]:
        return (self.name, self.features), (self.pool_name, self.pool)


class PairRule(Protocol):
    """A decision for each pair of N patches, from a few numbers of each patch."""

    witness: Tensor  # numbers of this rank's patches, NaN where one of its inputs was bad: for `checks.poison`

    def mask(self) -> PairMask:
        """All pairs, symmetric, without a diagonal."""

    def rows(self, first_row: int, rows: int) -> Tensor:
        """The bits of that many rows of the mask. Where s_ij = s_ji to the last bit (reference, cpu) exactly those of
        `mask`; elsewhere a pair within rounding of its threshold may differ."""


class PairsAbove:
    """P_ij = [i != j][ <f_i, f_j> > min(R_i, R_j) ] for unit rows f (N, C) and thresholds R (N,)."""

    def __init__(self, unit: Tensor, thresholds: Tensor, witness: Tensor, backend: str) -> None:
        self.unit, self.thresholds, self.witness, self.backend = unit, thresholds, witness, backend

    def mask(self) -> PairMask:
        return pairs_above(self.unit, self.thresholds, backend=self.backend)

    def rows(self, first_row: int, rows: int) -> Tensor:
        unit, thresholds, own = self.unit, self.thresholds, slice(first_row, first_row + rows)
        bits = similarity_search.pairs_above(unit[own], thresholds[own], unit, thresholds, self.backend)
        return clear_diagonal(bits, len(unit), first_row)


class PairsNamed:
    """P_ij = [i != j][ j in indices_i or i in indices_j ] for the lists indices (N, k)."""

    def __init__(self, indices: Tensor, witness: Tensor, backend: str) -> None:
        self.indices, self.witness, self.backend = indices, witness, backend

    def mask(self) -> PairMask:
        count = self.indices.shape[0]
        return PairMask(self.rows(0, count), count, symmetric=True)

    def rows(self, first_row: int, rows: int) -> Tensor:
        return pair_bits.pairs_from_indices(self.indices, self.indices.shape[0], True, first_row, rows, self.backend)


def check_graph(graph: Graph) -> None:
    """What can be wrong with one process's part of what `find_rule` takes."""
    name, features, pool_name, pool, k = graph
    check_float_tensor(name, features)
    if (pool is None) == (k is None):
        given = "neither" if pool is None else "both"
        raise ValueError(f"{pool_name}, positives_per_anchor: expected exactly one of the two, got {given}")
    if pool is not None:
        check_float_tensor(pool_name, pool, like=features)
        check_columns(pool_name, pool, name, features)
        if pool.shape[0] == 0:
            raise ValueError(f"{pool_name}: expected at least one row, got {describe(pool)}")
    else:
        check_int("positives_per_anchor", k)


def find_rule(graph: Graph, backend: str, ranks: Ranks = ALONE) -> PairRule:
    """The rule of `hidden_positives` for the patches of all ranks, from this rank's features and part of the pool."""
    name, features, pool_name, pool, k = graph
    if pool is not None:
        unit = normalize_rows(features.detach(), name, backend)
        every_pool = ranks.gather(normalize_rows(pool.detach(), pool_name, backend), pool_name)
        thresholds = max_similarity(unit, every_pool, backend=backend)
        # A threshold is NaN if its row or a row of the pool is.
        return PairsAbove(ranks.gather(unit, name), ranks.gather(thresholds, name), thresholds, backend)
    others = ranks.total(name, features) - 1
    if k is None or not 1 <= k <= others:
        raise ValueError(f"positives_per_anchor: expected 1 <= k <= {others} (N - 1), got {k}")
    unit = normalize_rows(features.detach(), name, backend)
    row_witness = witness(unit).clone()  # a view would keep all rows
    if ranks is ALONE:
        _, indices = topk_similarity(unit, unit, k, exclude_self=True, backend=backend)
        return PairsNamed(indices, row_witness, backend)
    _, found = topk_similarity(unit, ranks.gather(unit, name), k + 1, backend=backend)
    return PairsNamed(ranks.gather(_without_self(found, ranks.first_row(name)), name), row_witness, backend)


def _without_self(found: Tensor, first_row: int) -> Tensor:
    """The k best others of each row from its k + 1 best of all: without the row itself, or without the last."""
    rows, k = found.shape[0], found.shape[1] - 1
    is_self = found == torch.arange(first_row, first_row + rows, device=found.device)[:, None]
    place = torch.where(is_self.any(1), is_self.int().argmax(1), k)
    column = torch.arange(k, device=found.device)
    return found.gather(1, column + (column >= place[:, None]))
