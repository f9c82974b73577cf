"""Positive pairs found by search: from thresholds (`pairs_above`) and from features (`hidden_positives`)."""

from __future__ import annotations

from torch import Tensor

from hpkernels import dispatch
from hpkernels._checks import check_columns, check_float_tensor, describe
from hpkernels.ops.normalize.op import normalize_rows
from hpkernels.ops.pair_bits import op as pair_bits
from hpkernels.ops.similarity_search import op as search
from hpkernels.pairs import PairMask


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
        x: (N, C), any floating dtype, taken as given (not normalised). thresholds: (N,).
        keys: (M, C). key_thresholds: (M,), only with keys.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        PairMask of shape (N, N) or (N, M). Decisions on fp32 inputs are those of an IEEE fp32 product.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite input on the CPU.
    """
    bits = search.pairs_above(x, thresholds, keys, key_thresholds, backend)
    return PairMask(bits, x.shape[0] if keys is None else keys.shape[0], symmetric=keys is None)


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
    return mine("features", features, "pool", pool, positives_per_anchor, backend)


def mine(
    name: str, features: Tensor, pool_name: str, pool: Tensor | None, k: int | None, backend: str | None
) -> PairMask:
    """`hidden_positives` with the caller's argument names for the messages."""
    check_float_tensor(name, features)
    if (pool is None) == (k is None):
        given = "neither" if pool is None else "both"
        raise ValueError(f"{pool_name}, positives_per_anchor: expected exactly one of the two, got {given}")
    chosen = dispatch.choose(features.device, backend, features, pool)
    count = features.shape[0]
    if pool is not None:
        check_float_tensor(pool_name, pool, like=features)
        check_columns(pool_name, pool, name, features)
        if pool.shape[0] == 0:
            raise ValueError(f"{pool_name}: expected at least one row, got {describe(pool)}")
        unit = normalize_rows(features.detach(), name, chosen)
        thresholds = search.max_similarity(unit, normalize_rows(pool.detach(), pool_name, chosen), backend=chosen)
        return pairs_above(unit, thresholds, backend=chosen)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"positives_per_anchor: expected an int, got {k!r}")
    if not 1 <= k <= count - 1:
        raise ValueError(f"positives_per_anchor: expected 1 <= k <= {count - 1} (N - 1), got {k}")
    unit = normalize_rows(features.detach(), name, chosen)
    _, indices = search.topk_similarity(unit, unit, k, exclude_self=True, backend=chosen)
    return PairMask(pair_bits.pairs_from_indices(indices, count, True, chosen), count, symmetric=True)
