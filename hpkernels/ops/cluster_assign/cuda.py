"""Assignment to the nearest centroid on `hpkernels._cuda`: nothing is synchronised, scratch comes from torch.

Scores of fp16 and bf16 rows are taken on the matrix units with fp32 sums, those of fp32 rows in IEEE arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hpkernels import _cuda
from hpkernels.ops.cluster_assign import reference
from hpkernels.ops.cluster_assign.common import direction_parts
from hpkernels.ops.common.cuda import SUFFIX, aligned, launch, require_supported, whole_chunks


def cluster_assign(
    x: Tensor, centroids: Tensor, directions: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """labels int64, distances, sums and counts of fp32 centroids; see reference.py.

    A row without a score that is a number gets label 0 and a distance that is not finite.
    """
    require_supported(x=x, centroids=centroids)
    if x.numel() == 0:
        return reference.cluster_assign(x, centroids, directions, bias)
    (n, depth), k = x.shape, centroids.shape[0]
    x = whole_chunks(x)
    width = x.shape[1]
    centroids = aligned(pad(centroids, (0, width - depth)))
    tiles, directions, bias = _direction_tiles(directions, bias, x.dtype, width)
    labels = torch.empty(n, dtype=torch.int64, device=x.device)
    distances = torch.empty(n, dtype=torch.float32, device=x.device)
    launch(_function("cluster_assign", x), x.device, x.data_ptr(), n, width, directions.data_ptr(), bias.data_ptr(),
           centroids.data_ptr(), tiles, labels.data_ptr(), distances.data_ptr())  # fmt: skip
    sums, counts = _sums(x, labels, k)
    return labels, distances, sums[:, :depth].contiguous(), counts


def _direction_tiles(directions: Tensor, bias: Tensor, dtype: torch.dtype, width: int) -> tuple[int, Tensor, Tensor]:
    """The number of tiles, their rows (tiles, parts, 64, width), and the bias (tiles * 64,), -inf past the last one."""
    k, depth = directions.shape
    if k == 1:
        return 0, directions, bias  # all rows are its own: no products
    tiles = -(-k // _cuda.cluster_directions)
    missing = tiles * _cuda.cluster_directions - k
    parts, bias = direction_parts(directions, bias, dtype)
    padded = torch.stack([pad(part, (0, width - depth, 0, missing)) for part in parts])
    of_tiles = padded.unflatten(1, (tiles, _cuda.cluster_directions)).transpose(0, 1).contiguous()
    return tiles, of_tiles, pad(bias, (0, missing), value=-torch.inf).contiguous()


def _sums(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """fp32 (K, width), int64 (K,): rows in order of their labels, at most 128 to a sum in fp32, those in fp64."""
    n, width = x.shape
    ordered, order = labels.to(torch.int32).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(k + 1, dtype=torch.int32, device=x.device))
    parts = torch.empty(-(-n // _cuda.cluster_run) + k - 1, width, dtype=torch.float32, device=x.device)
    launch(_function("cluster_sum", x), x.device, x.data_ptr(), n, width, order.data_ptr(), ordered.data_ptr(),
           parts.data_ptr())  # fmt: skip
    sums = torch.empty(k, width, dtype=torch.float32, device=x.device)
    launch(_cuda.cluster_total, x.device, parts.data_ptr(), starts.data_ptr(), k, width, sums.data_ptr())
    return sums, starts.diff()


def _function(name: str, x: Tensor):
    return getattr(_cuda, f"{name}_{SUFFIX[x.dtype]}")
