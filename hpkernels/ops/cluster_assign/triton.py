"""Assignment to the nearest centroid in Triton: labels and distances by one kernel, sums by another, no atomics.

Centroids are fp32. Against 16-bit rows their directions are taken as three 16-bit numbers each (common.py): three
products on the matrix units instead of one in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.cluster_assign.common import direction_parts
from hpkernels.ops.common.gpu import padded_rows
from hpkernels.ops.common.triton import on_device, precision, require_supported, split_tiles, tile_product
from hpkernels.tuning import dtype_class

_LABEL_TILES = {
    "half": dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3),
    "single": dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2),
}
_SUM_TILES = {
    "half": dict(BLOCK_C=64, BLOCK_N=64, BLOCK_D=64, num_warps=4, num_stages=3),
    "single": dict(BLOCK_C=32, BLOCK_N=32, BLOCK_D=64, num_warps=4, num_stages=2),
}
_TABLE_BYTES = 64 << 20  # of partial sums, unless one table alone is larger
_LONGEST_SUM = 1 << 14  # rows of a partial sum in fp32, where the tables have room


@triton.jit
def _cluster_assign_label_kernel(
    x_ptr, directions_ptr, centroids_ptr, bias_ptr, label_ptr, distance_ptr, N, K, D,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """label_i = argmax_k sum over PARTS of <x_i, directions_k> + bias_k, of equal ones the lowest k; |x_i - mu|^2."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_rows = tl.minimum(rows, N - 1)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK_M], tl.int32)
    for tile in range(0, tl.cdiv(K, BLOCK_N)):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_cols = tl.minimum(cols, K - 1)
        s = tile_product(x_ptr, directions_ptr, valid_rows, valid_cols, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        for part in tl.static_range(1, PARTS):
            s += tile_product(
                x_ptr, directions_ptr, valid_rows, valid_cols + part * K, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
        s = tl.where((cols < K)[None, :], s + tl.load(bias_ptr + valid_cols)[None, :], float("-inf"))
        value = tl.max(s, 1)
        at = tl.min(tl.where(s == value[:, None], cols[None, :], 0x7FFFFFFF), 1)
        better = value > best  # strictly: an equal value of a later tile has a higher index
        best = tl.where(better, value, best)
        best_at = tl.where(better, at, best_at)
    distance = tl.zeros([BLOCK_M], tl.float32)
    x_rows = x_ptr + valid_rows.to(tl.int64)[:, None] * D
    mu_rows = centroids_ptr + best_at.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        difference = tl.load(x_rows + d[None, :]).to(tl.float32) - tl.load(mu_rows + d[None, :])
        distance += tl.sum(difference * difference, 1)
    tl.store(label_ptr + rows, best_at.to(tl.int64), mask=rows < N)
    tl.store(distance_ptr + rows, distance, mask=rows < N)


@triton.jit
def _cluster_assign_sum_kernel(
    x_ptr, label_ptr, out_ptr, count_ptr, N, K, D, tiles_per_split,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, k, d] = sum of x_id over the split's rows of label k: a product with ones and zeros; their number."""
    clusters = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_C], tl.int32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(N, BLOCK_N))
    for tile in range(split * tiles_per_split, last):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_rows = tl.minimum(rows, N - 1)
        labels = tl.where(rows < N, tl.load(label_ptr + valid_rows), -1)
        x = tl.load(x_ptr + valid_rows.to(tl.int64)[:, None] * D + d[None, :])
        member = clusters[:, None] == labels[None, :]
        acc = tl.dot(member.to(x.dtype), x, acc, input_precision=PRECISION)
        count += tl.sum(member.to(tl.int32), 1)
    out_at = (split.to(tl.int64) * K + clusters)[:, None] * D + d[None, :]
    tl.store(out_ptr + out_at, acc, mask=(clusters < K)[:, None])
    if tl.program_id(1) == 0:
        tl.store(count_ptr + split.to(tl.int64) * K + clusters, count, mask=clusters < K)


def cluster_assign(
    x: Tensor, centroids: Tensor, directions: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """labels int64, distances, sums and counts of fp32 centroids; see reference.py."""
    require_supported(x=x, centroids=centroids)
    (n, depth), k = x.shape, centroids.shape[0]
    labels = torch.empty(n, dtype=torch.int64, device=x.device)
    distances = torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0:
        return labels, distances, torch.zeros_like(centroids), torch.zeros(k, dtype=torch.int64, device=x.device)
    kind = dtype_class(x.dtype)
    config = _LABEL_TILES[kind]
    x = padded_rows(x.contiguous(), 64)  # whole steps and pieces of both kernels
    centroids, directions = (padded_rows(part.contiguous(), 64) for part in (centroids, directions))
    width = x.shape[1]
    parts, bias = direction_parts(directions, bias, x.dtype)
    with on_device(x):
        _cluster_assign_label_kernel[(triton.cdiv(n, config["BLOCK_M"]),)](
            x, torch.cat(parts), centroids, bias.contiguous(), labels, distances, n, k, width,
            PARTS=len(parts), PRECISION=precision(x.dtype, full=True), **config,
        )  # fmt: skip
    sums, counts = _sums(x, labels, k)
    return labels, distances, sums[:, :depth].contiguous(), counts


def _sums(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """fp32 (K, D) and int64 (K,): partial sums over ranges of rows, added in fp64 in their order."""
    n, d = x.shape
    config = _SUM_TILES[dtype_class(x.dtype)]
    cluster_tiles, pieces = triton.cdiv(k, config["BLOCK_C"]), d // config["BLOCK_D"]
    tiles = triton.cdiv(n, config["BLOCK_N"])
    splits, _ = split_tiles(cluster_tiles * pieces, tiles, x.device)
    splits = min(max(splits, triton.cdiv(n, _LONGEST_SUM)), max(1, _TABLE_BYTES // (4 * k * d)), tiles)
    per_split = triton.cdiv(tiles, splits)
    out = torch.empty((triton.cdiv(tiles, per_split), k, d), dtype=torch.float32, device=x.device)
    counts = torch.empty(out.shape[:2], dtype=torch.int32, device=x.device)
    with on_device(x):
        _cluster_assign_sum_kernel[(cluster_tiles, pieces, out.shape[0])](
            x, labels, out, counts, n, k, d, per_split, PRECISION=precision(x.dtype, full=True), **config
        )
    return out.sum(0, dtype=torch.float64).float(), counts.sum(0)
