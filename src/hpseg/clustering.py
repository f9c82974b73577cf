"""Spherical k-means: clusters of directions, by inner product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spherical_kmeans(
    x: Tensor, k: int, *, restarts: int = 10, iterations: int = 50, seed: int = 0
) -> tuple[Tensor, float]:
    """Centroids (k, C) of unit length for rows x (N, C), and the mean of max_k cos(x, c_k), best of `restarts`.

    Each restart seeds by k-means++ on cosine distance and stops early when no row changes its cluster. An empty cluster
    moves to the row that fits its own cluster worst.
    """
    if x.shape[0] < k:
        raise ValueError(f"x: expected at least k = {k} rows, got {x.shape[0]}")
    x = F.normalize(x.float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    best, best_score = x[:k], -float("inf")
    for _ in range(restarts):
        centroids, score = _one_run(x, _plus_plus(x, k, generator), iterations)
        if score > best_score:
            best, best_score = centroids, score
    return best, best_score


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(x.shape[0], (), generator=generator))]
    distance = torch.full((x.shape[0],), float("inf"), device=x.device)
    for _ in range(k - 1):
        distance = torch.minimum(distance, (1 - x @ x[chosen[-1]]).clamp_min(0))
        cumulative = distance.double().cumsum(0)
        point = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, point)), x.shape[0] - 1))
    return x[chosen]


def _one_run(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, float]:
    k, previous = centroids.shape[0], None
    for _ in range(iterations):
        similarity, labels = (x @ centroids.T).max(-1)
        if previous is not None and torch.equal(labels, previous):
            break
        previous = labels
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        empty = (torch.bincount(labels, minlength=k) == 0).nonzero().flatten()
        if len(empty):
            sums[empty] = x[similarity.argsort()[: len(empty)]]
        centroids = F.normalize(sums, dim=-1)
    return centroids, float((x @ centroids.T).amax(-1).mean())
