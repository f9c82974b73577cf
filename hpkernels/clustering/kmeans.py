"""k-means of rows that may not fit in memory: Lloyd's and mini-batch, Euclidean and spherical; outlier thresholds."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.clustering.rows import Rows, look_centroids, scores
from hpkernels.common.checks import (
    check_choice,
    check_columns,
    check_flag,
    check_float_tensor,
    check_int,
    describe,
    plain,
)
from hpkernels.common.sums import sum_all
from hpkernels.ops.cluster_assign.op import cluster_assign
from hpkernels.ops.normalize.op import normalize_rows


class Assignment(NamedTuple):
    """What one pass over rows yields. Distances are squared; between unit vectors for spherical clusters: 2 - 2 cos."""

    labels: Tensor  # int64 (N,)
    distances: Tensor  # (N,), to the nearest centroid
    sums: Tensor  # (K, D), of the rows of each cluster (unit rows if spherical)
    counts: Tensor  # int64 (K,)

    @property
    def inertia(self) -> Tensor:
        """Sum of all distances, fp64."""
        return sum_all(self.distances.double())


class Clustering(NamedTuple):
    """The result of `kmeans`."""

    centroids: Tensor  # (K, D) fp32 (fp64 for fp64), of unit length if spherical
    labels: Tensor  # int64 (N,), nearest centroids, rows of all batches one after the other
    counts: Tensor  # int64 (K,)
    inertia: float  # sum of squared distances
    iterations: int  # passes of the best restart


def assign_clusters(x: Tensor, centroids: Tensor, *, spherical: bool = False, backend: str | None = None) -> Assignment:
    """The nearest centroid of every row, and the sums and counts of the clusters, without N x K numbers.

    Args:
        x: (N, D), any floating dtype; accumulated in fp32 (fp64 for fp64). centroids: (K, D), K >= 1.
        spherical: by cosine; rows and centroids are normalised inside.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        Assignment. Ties go to the lower index. Bitwise repeatable. No gradient. Batches of a stream are combined by
        adding their sums and counts.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite x or centroids on the CPU.
    """
    check_float_tensor("x", x)
    check_float_tensor("centroids", centroids, like=x)
    check_columns("centroids", centroids, "x", x)
    if centroids.shape[0] == 0:
        raise ValueError(f"centroids: expected at least one row, got {describe(centroids)}")
    check_flag("spherical", spherical)
    chosen = dispatch.choose(x.device, backend, x, centroids)
    x, centroids = x.detach(), centroids.detach()
    if torch.float64 in (x.dtype, centroids.dtype):
        x, centroids = x.double(), centroids.double()
    else:
        centroids = centroids.float()
    look_centroids("centroids", centroids, spherical)
    if spherical:
        x, centroids = normalize_rows(x, "x", chosen), normalize_rows(centroids, "centroids", chosen)
    return Assignment(*cluster_assign(x, centroids, *scores(centroids, spherical), chosen))


def kmeans(
    x: Tensor | Iterable[Tensor],
    k: int,
    *,
    init: str | Tensor = "k-means++",
    spherical: bool = False,
    iterations: int = 100,
    tolerance: float = 1e-4,
    restarts: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> Clustering:
    """k-means clusters of rows: Lloyd's algorithm, or with a batch_size the mini-batch update.

    Lloyd: centroids move to the means of their rows until no label changes, or until the summed squared movement is at
    most tolerance times the mean variance of the columns; the rules, and the treatment of empty clusters, are those of
    scikit-learn, and so is the result from the same start (up to rounding). Mini-batch (Sculley 2010): after each batch
    a centroid moves to mu <- (1 - eta) mu + eta mean of its rows, eta = rows of the batch / rows so far.
    A cluster without rows restarts at the row farthest from its centroid.

    Args:
        x: (N, D), N >= k, any floating dtype, or an iterable of such batches that can be iterated again (a list, a
            loader): one pass over it for each iteration, 2 k - 1 for k-means++, and up to three for checks, the
            variance that tolerance refers to, and the labels at the end.
        k: number of clusters.
        init: "k-means++" (Arthur and Vassilvitskii 2007), "random" (k different rows), or centroids (k, D).
        spherical: clusters of directions: rows are normalised, centroids are unit means, distances 2 - 2 cos.
        iterations: at most so many passes. tolerance: >= 0; 0 runs until no label changes (mini-batch: all iterations).
        restarts: runs from different starts, of which the one of least inertia is kept. Only 1 with centroids in init.
        batch_size: rows of a mini-batch, taken in order; shuffle them beforehand if their order means something.
        seed: of all random choices, which do not depend on the device's generator.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        Clustering. Bitwise repeatable for a backend. Synchronises the device after each pass.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite x on the CPU.
    """
    k, iterations, tolerance, restarts, batch_size = map(plain, (k, iterations, tolerance, restarts, batch_size))
    rows = Rows(x, spherical, backend)
    _check_counts(k, iterations, restarts, batch_size, rows)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance: expected a finite number >= 0, got {tolerance!r}")
    seed = check_int("seed", seed)
    _check_init(init, k, restarts, rows)
    generator = torch.Generator().manual_seed(seed)
    movement = tolerance * rows.mean_variance() if tolerance and batch_size is None else 0.0

    def run() -> Clustering:
        centroids = _start(rows, k, init, generator)
        if batch_size is None:
            return _lloyd(rows, centroids, iterations, movement)
        return _mini_batch(rows, centroids, iterations, batch_size)

    best = run()
    for _ in range(restarts - 1):
        best = min(best, run(), key=attrgetter("inertia"))  # the first of equal ones
    return best


def _lloyd(rows: Rows, centroids: Tensor, iterations: int, movement: float) -> Clustering:
    previous = None
    for iteration in range(1, iterations + 1):
        found, sums, distances = _pass(rows, centroids)
        if previous is not None and torch.equal(found.labels, previous):
            return found._replace(iterations=iteration)
        previous = found.labels
        moved = _means(rows, centroids, sums, found, distances)
        shift = float(sum_all((moved.double() - centroids.double()).square()))
        centroids = moved
        if shift <= movement:
            break
    return _pass(rows, centroids)[0]._replace(iterations=iteration)


def _pass(rows: Rows, centroids: Tensor) -> tuple[Clustering, Tensor, Tensor]:
    """One pass: the clustering by these centroids, the sums of the clusters (fp64), and all distances."""
    how = scores(centroids, rows.spherical)
    labels, parts = [], []
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
    for batch in rows:
        found = Assignment(*cluster_assign(batch, centroids, *how, rows.backend))
        labels.append(found.labels)
        parts.append(found.distances)
        sums, counts = sums + found.sums, counts + found.counts
    distances = torch.cat(parts)
    inertia = float(sum_all(distances.double()))
    return Clustering(centroids, torch.cat(labels), counts, inertia, 0), sums, distances


def _means(rows: Rows, centroids: Tensor, sums: Tensor, found: Clustering, distances: Tensor) -> Tensor:
    """The means of the clusters; empty ones take the rows that are farthest from their centroids, out of theirs."""
    counts, empty = found.counts.clone(), (found.counts == 0).nonzero()[:, 0]
    if len(empty):
        farthest = distances.argsort(descending=True, stable=True)[: len(empty)]
        taken = rows.pick(farthest.cpu()).double()
        for cluster, row, index in zip(empty.tolist(), taken, farthest):
            sums[found.labels[index]] -= row
            counts[found.labels[index]] -= 1
            sums[cluster] = row
            counts[cluster] = 1
    means = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centroids.double())
    return _unit(means, centroids) if rows.spherical else means.to(centroids.dtype)


def _mini_batch(rows: Rows, centroids: Tensor, iterations: int, batch_size: int) -> Clustering:
    seen = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
    waiting = True  # some clusters, for a first row
    for iteration in range(1, iterations + 1):  # noqa: B007 (the last one is told)
        before = centroids
        for batch in rows:
            for part in batch.split(batch_size):
                how = scores(centroids, rows.spherical)
                _, distances, sums, counts = cluster_assign(part, centroids, *how, rows.backend)
                seen = seen + counts
                eta = (counts / seen.clamp_min(1))[:, None].double()
                means = sums.double() / counts.clamp_min(1)[:, None]
                moved = centroids.double() * (1 - eta) + eta * means
                if waiting:  # asking synchronises a GPU
                    empty = (seen == 0).nonzero()[:, 0]
                    waiting, empty = len(empty) > 0, empty[: len(part)]
                    moved[empty] = part[distances.argsort(descending=True, stable=True)[: len(empty)]].double()
                centroids = _unit(moved, centroids) if rows.spherical else moved.to(centroids.dtype)
        if torch.equal(before, centroids):
            break
    return _pass(rows, centroids)[0]._replace(iterations=iteration)


def _unit(means: Tensor, before: Tensor) -> Tensor:
    """Unit means; where directions cancel to a mean of zero, what was there before."""
    length = means.norm(dim=1, keepdim=True)
    return torch.where(length > 0, means / torch.where(length > 0, length, 1.0), before.double()).to(before.dtype)


def _start(rows: Rows, k: int, init: str | Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(init, Tensor):
        init = init.detach().to(rows.dtype)
        return normalize_rows(init, "init", rows.backend) if rows.spherical else init
    if init == "random":
        return rows.pick(torch.randperm(rows.count, generator=generator)[:k])
    return _plus_plus(rows, k, generator)


def _plus_plus(rows: Rows, k: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one after the other, each with probability proportional to its squared distance from those drawn."""
    chosen = [int(torch.randint(rows.count, (), generator=generator))]
    nearest = None
    for _ in range(k - 1):
        last = rows.pick(torch.tensor(chosen[-1:]))
        how = scores(last, rows.spherical)
        to_last = torch.cat([cluster_assign(batch, last, *how, rows.backend)[1] for batch in rows])
        nearest = to_last if nearest is None else torch.minimum(nearest, to_last)
        cumulative = nearest.cpu().double().cumsum(0)  # on the CPU: a GPU's cumsum is not repeatable
        point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, point, right=True)), rows.count - 1))
    return rows.pick(torch.tensor(chosen))


def _check_counts(k: int, iterations: int, restarts: int, batch_size: int | None, rows: Rows) -> None:
    for name, value in (("k", k), ("iterations", iterations), ("restarts", restarts), ("batch_size", batch_size)):
        if name != "batch_size" or value is not None:
            check_int(name, value, least=1)
    if k > rows.count:
        raise ValueError(f"x: expected at least k = {k} rows, got {rows.count}")


def _check_init(init: str | Tensor, k: int, restarts: int, rows: Rows) -> None:
    if not isinstance(init, Tensor):
        check_choice("init", init, ("k-means++", "random"))
        return
    check_float_tensor("init", init)
    if tuple(init.shape) != (k, rows.width) or init.device != rows.device:
        raise ValueError(f"init: expected shape {(k, rows.width)} on {rows.device}, got {describe(init)}")
    look_centroids("init", init.detach().to(rows.dtype), rows.spherical)
    if restarts != 1:
        raise ValueError(f"restarts: expected 1 with centroids in init, got {restarts}")
