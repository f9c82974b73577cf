"""The nearest centroid of each row, with the sums and counts of all clusters, as a torch op. Not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import check_finite


@torch.library.custom_op("hpkernels::cluster_assign", mutates_args=())
def cluster_assign(
    x: Tensor, centroids: Tensor, directions: Tensor, bias: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """label_i = argmax_k <x_i, directions_k> + bias_k, ties to the lower k; distance_i = |x_i - centroids_label|^2.

    Args:
        x: (N, D), any floating dtype, contiguous rows. centroids, directions: (K, D), K >= 1; bias: (K,); all
        three fp32,
            or fp64 exactly where x is fp64.

    Returns:
        labels int64 (N,), distances (N,), sums (K, D) of the rows of each cluster, counts int64 (K,). Floats are fp32
        (fp64 for fp64). Equal bit for bit from call to call and for any thread count.
    """
    if backend != "cpu":  # the C++ kernel looks at every distance
        check_finite("x", x)
        check_finite("centroids", centroids)
    return dispatch.function("cluster_assign", "cluster_assign", backend, x)(x, centroids, directions, bias)


@cluster_assign.register_fake
def _(x, centroids, directions, bias, backend):
    labels = x.new_empty(x.shape[:1], dtype=torch.int64)
    counts = x.new_empty(centroids.shape[:1], dtype=torch.int64)
    return labels, centroids.new_empty(x.shape[:1]), torch.empty_like(centroids), counts
