"""k-means of the features of a whole training set: read in passes, never held whole.

A sample that fits in memory gives the start (k-means++ and Lloyd's iterations, on all rows where they fit); passes over
everything refine it where asked for. Random numbers come from the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import hpkernels
from hpseg.run.errors import UsageError

HELD_BYTES = 1 << 30
SAMPLE_ROWS = 1 << 18


class FeatureStream:
    """Batches of feature rows (n, D) that can be iterated again and again.

    make(first): yields the batches number `first`, `first` + 1, ..., the same rows every time it is called. Batches are
    remembered from the first one on, up to `hold` bytes together; a later pass asks `make` only for the others, so that
    a small set is encoded once and a large one takes no more memory than that.
    """

    def __init__(self, make: Callable[[int], Iterable[Tensor]], hold: int = HELD_BYTES):
        self.make, self.free = make, hold
        self.held: list[Tensor] = []
        self.count: int | None = None  # of batches, once a pass has reached the end

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.held
        number = len(self.held)
        if number == self.count:
            return
        for batch in self.make(number):
            size = batch.nelement() * batch.element_size()
            if number == len(self.held) and size <= self.free:
                self.held.append(batch.detach().clone())
                self.free -= size
            number += 1
            yield batch
        self.count = number


def sample_rows(stream: Iterable[Tensor], most: int, seed: int) -> tuple[Tensor, bool]:
    """(rows, whether they are all): all rows in their order if there are at most `most`, else `most` random ones.

    One pass, every row with the same probability (reservoir sampling), in memory of `most` rows and one batch.
    """
    generator = torch.Generator().manual_seed(seed)
    parts, rows, seen = [], None, 0
    for batch in stream:
        batch = batch.detach()
        if rows is None:
            parts.append(batch[: most - seen].clone())  # a view would keep the whole batch
            first = len(parts[-1])
            if seen + len(batch) >= most:
                rows = torch.cat(parts)
                parts.clear()
        else:
            first = 0
        late = batch[first:]
        if len(late):
            numbers = torch.arange(seen + first, seen + len(batch), dtype=torch.float64)
            slots = (torch.rand(len(late), generator=generator, dtype=torch.float64) * (numbers + 1)).long()
            taken = (slots < most).nonzero()[:, 0]
            last = dict(zip(slots[taken].tolist(), taken.tolist(), strict=True))  # of two rows for a slot the later one
            if last:
                into, which = (torch.tensor(list(part), device=rows.device) for part in (last.keys(), last.values()))
                rows[into] = late[which]
        seen += len(batch)
    if rows is None:
        if not parts:
            raise UsageError("features: expected at least one row to cluster, got none")
        rows = torch.cat(parts)
    return rows, seen <= most


def cluster_features(
    stream: Iterable[Tensor],
    k: int,
    *,
    seed: int = 0,
    spherical: bool = True,
    iterations: int = 50,
    restarts: int = 1,
    rows: int = SAMPLE_ROWS,
    passes: int = 0,
    minibatch: int | None = None,
) -> Tensor:
    """Centroids (k, D) of the rows of `stream`, in fp32 (fp64 for fp64), unit rows if spherical.

    stream: batches (n, D) that can be iterated again, on one device: a list, or a FeatureStream.
    iterations, restarts: of Lloyd's algorithm from k-means++ on a random sample of at most `rows` rows.
    passes: from there on over all rows, by Lloyd's algorithm or, with `minibatch` rows at a time, by mini-batches with
        counts from zero. Lloyd's needs none where the sample is everything. Two more passes check and finish.

    Raises UsageError if there are fewer than k rows. Repeatable for a backend of hpkernels.
    """
    sample, complete = sample_rows(stream, max(rows, k), seed)
    if len(sample) < k:
        raise UsageError(f"clusters: expected at least one feature row for each of {k}, got {len(sample)} rows")
    options = dict(spherical=spherical, tolerance=0, seed=seed)
    centroids = hpkernels.kmeans(sample, k, iterations=iterations, restarts=restarts, **options).centroids
    if passes and not (complete and minibatch is None):
        x = sample if complete else stream
        found = hpkernels.kmeans(x, k, init=centroids, iterations=passes, batch_size=minibatch, **options)
        centroids = found.centroids
    return centroids


def assign_features(
    stream: Iterable[Tensor], centroids: Tensor, *, spherical: bool = True, thresholds: Tensor | None = None
) -> Iterator[Tensor]:
    """Of each batch the labels of its rows, int64 (n,): the nearest centroid, -1 for rows beyond its threshold.

    thresholds: squared distances (K,) as of hpkernels.outlier_distances.
    """
    for batch in stream:
        found = hpkernels.assign_clusters(batch, centroids, spherical=spherical)
        if thresholds is None:
            yield found.labels
        else:
            yield torch.where(found.distances > thresholds[found.labels], -1, found.labels)
