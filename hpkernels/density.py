"""How crowded the surroundings of a feature are, from its nearest rows of a memory (`neighbor_density`)."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import check_columns, check_float_tensor, plain, poison, witness
from hpkernels.ops.normalize.op import normalize_rows
from hpkernels.search import check_groups, topk_similarity

_CPU_ROWS = 4096  # features searched at a time on a CPU, so that their unit rows and packed copies take little memory


def neighbor_density(
    features: Tensor,
    memory: Tensor,
    *,
    scales: tuple[int, ...] = (8, 16, 32),
    query_groups: Tensor | None = None,
    memory_groups: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-scale density of features among the rows of a memory (DGCL: Wang et al., CVPR 2023), without N x M numbers.

        rho_k(i) = mean of the k largest cos(f_i, m_j),        rho(i) = mean of rho_k(i) over the scales k

    One search for the max(scales) nearest serves all scales. Rows are normalised inside, in fp32; zero rows have cosine
    0 with everything.

    Args:
        features: (N, C), any floating dtype. memory: (M, C) on the same device; must not hold the features themselves,
            which would be their own nearest rows.
        scales: numbers of neighbours, each >= 1.
        query_groups, memory_groups: int64 (N,) and (M,), as classes: a feature meets the memory rows of its group, all
            groups in one search.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        (N,) fp32 in [-1, 1]. Where a group has fewer than k rows, rho_k is the mean over those it has; 0 where it has
        none. No gradient.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite input on the CPU.
    """
    check_float_tensor("features", features)
    check_float_tensor("memory", memory, like=features)
    check_columns("memory", memory, "features", features)
    scales = _check_scales(scales)
    if (query_groups is None) != (memory_groups is None):
        missing = "query_groups" if query_groups is None else "memory_groups"
        raise ValueError(f"{missing}: expected with the other groups argument, got None")
    for name, groups, rows in (("query_groups", query_groups, features), ("memory_groups", memory_groups, memory)):
        if groups is not None:
            check_groups(name, groups, rows)
    chosen = dispatch.choose(features.device, backend, features, memory)
    unit_memory = normalize_rows(memory.detach(), "memory", chosen)
    nearest = min(max(scales), memory.shape[0])
    if nearest == 0:
        return torch.zeros(features.shape[0], dtype=torch.float32, device=features.device)
    rows_at_a_time = _CPU_ROWS if features.is_cpu else max(1, features.shape[0])
    parts = features.detach().split(rows_at_a_time)
    part_groups = [None] * len(parts) if query_groups is None else query_groups.split(rows_at_a_time)
    return torch.cat(
        [
            _density(part, group, unit_memory, memory_groups, nearest, scales, chosen)
            for part, group in zip(parts, part_groups)
        ]
    )


def _density(
    features: Tensor, groups: Tensor | None, unit_memory: Tensor, memory_groups: Tensor | None, nearest: int,
    scales: tuple[int, ...], backend: str,
) -> Tensor:  # fmt: skip
    unit = normalize_rows(features, "features", backend)
    values, _ = topk_similarity(
        unit, unit_memory, nearest, query_groups=groups, key_groups=memory_groups, backend=backend
    )
    found = values > -torch.inf
    density = (values.masked_fill(~found, 0.0) * _rank_weights(found, scales)).sum(1)
    if not features.is_cpu:  # NaN where a comparison hides a bad number; the CPU has refused it
        density = density + (witness(unit) * 0.0).sum(1).float() + poison(witness(unit_memory))
    return density


def _rank_weights(found: Tensor, scales: tuple[int, ...]) -> Tensor:
    """w_ir = sum_k [r < k] / (|scales| min(k, n_i)) for the n_i neighbours that row i has. (N, r)"""
    rank = torch.arange(found.shape[1], device=found.device)
    count = found.sum(1, keepdim=True)
    weights = torch.zeros(found.shape, dtype=torch.float32, device=found.device)
    for k in scales:
        weights = weights + (rank < k).float() / (len(scales) * count.clamp(1, k))
    return weights


def _check_scales(scales: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(scales, (tuple, list)):
        scales = tuple(map(plain, scales))
    if not isinstance(scales, (tuple, list)) or not all(isinstance(k, int) and not isinstance(k, bool) for k in scales):
        raise TypeError(f"scales: expected a tuple of ints, got {scales!r}")
    if not scales or min(scales) < 1:
        raise ValueError(f"scales: expected at least one number, each >= 1, got {scales!r}")
    return tuple(scales)
