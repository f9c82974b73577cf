"""Assignment to the nearest centroid in plain torch, row block by row block."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_SCORES = 1 << 24  # scores alive at a time


def cluster_assign(
    x: Tensor, centroids: Tensor, directions: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """label_i = argmax_k <x_i, directions_k> + bias_k, ties to the lower k; distance_i = |x_i - centroids_label|^2."""
    (n, d), k = x.shape, centroids.shape[0]
    labels = torch.empty(n, dtype=torch.int64, device=x.device)
    distances = centroids.new_empty(n)
    sums = torch.zeros(k, d, dtype=torch.float64, device=x.device)
    step = max(1, _BLOCK_SCORES // max(k, d, 1))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, n, step):
            rows = slice(start, start + step)
            block = x[rows].to(centroids.dtype)
            labels[rows] = torch.addmm(bias, block, directions.T).argmax(1)  # the first of equal ones
            distances[rows] = (block - centroids[labels[rows]]).square().sum(1)
            one_hot = torch.nn.functional.one_hot(labels[rows], k).to(torch.float64)
            sums += one_hot.T @ block.double()  # a product adds in a fixed order, where index_add_ may not
    counts = torch.zeros(k, dtype=torch.int64, device=x.device).scatter_add_(0, labels, torch.ones_like(labels))
    return labels, distances, sums.to(centroids.dtype), counts
