"""Assignment to the nearest centroid on the CPU: the pointer calls into `hpkernels._cpu`."""

import torch
from torch import Tensor

from hpkernels.common.checks import check_finite, describe
from hpkernels.ops.common.cpu import kernel

_CONVERTED_NUMBERS = 1 << 23  # of x in fp32 at a time, where x is fp16 or bf16


def cluster_assign(
    x: Tensor, centroids: Tensor, directions: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """labels, distances, sums and counts; see reference.py. ValueError, by name, where a distance is not finite."""
    (rows, depth), clusters = x.shape, centroids.shape[0]
    centroids, directions, bias = (part.contiguous() for part in (centroids, directions, bias))
    labels = torch.empty(rows, dtype=torch.int64)
    distances = centroids.new_empty(rows)
    sums = torch.zeros(clusters, depth, dtype=torch.float64)
    counts = torch.zeros(clusters, dtype=torch.int64)
    function = kernel("cluster_assign", centroids.dtype)
    step = max(1, rows if x.dtype == centroids.dtype else _CONVERTED_NUMBERS // max(1, depth))
    for start in range(0, rows, step):
        part = x[start : start + step].to(centroids.dtype).contiguous()
        finite = function(
            part.data_ptr(), part.shape[0], depth, centroids.data_ptr(), directions.data_ptr(), bias.data_ptr(),
            clusters, labels[start:].data_ptr(), distances[start:].data_ptr(), sums.data_ptr(), counts.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if not finite:
            check_finite("x", x)
            check_finite("centroids", centroids)
            raise ValueError(f"x: expected numbers whose squared distances are finite, got {describe(x)}")
    return labels, distances, sums.to(centroids.dtype), counts
