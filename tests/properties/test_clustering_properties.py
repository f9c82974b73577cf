"""Clustering and outliers: assignments against fp64, the rules of Lloyd's algorithm, and what must not show."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

import hpkernels as hk
from tests.properties.cases import Matrix, matrices, same_bits, seeds, tries, unit, with_threads, working


def assigned(x: Tensor, centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64: what is to be least (N, K), squared distances, and how far a choice or a distance may be off."""
    eps = torch.finfo(working(x, centroids)).eps
    if spherical:
        x, centroids = unit(x), unit(centroids)
    x, centroids = x.double(), centroids.double()
    squared = (x[:, None] - centroids).square().sum(2)
    # Scores are <x, mu - c> - <mu - c, mu + c> / 2 with the mean c of the centroids; spherical: <x, mu>.
    size = x.norm(dim=1, keepdim=True) + centroids.norm(dim=1).max()
    spread = size if spherical else (centroids - centroids.mean(0)).norm(dim=1).max()
    near = 16 * eps * x.shape[1] ** 0.5 * (spread * size + squared.amin(1, keepdim=True))
    return -2 * x @ centroids.T if spherical else squared, squared, near


@tries(
    lambda on: dict(
        x=matrices(st.integers(0, on.most(250)), on.dtypes, max_spread=20), k=st.integers(1, 60),
        spherical=st.booleans(), seed=seeds(), backend=on.backend,
    ),
)  # fmt: skip
def test_the_nearest_centroid(x: Matrix, k, spherical, seed, backend):
    given, centroids = x.tensor(), x.like(k, seed)
    found = hk.assign_clusters(given, centroids, spherical=spherical, backend=backend)
    cost, squared, near = assigned(given, centroids, spherical)
    label = found.labels[:, None]
    assert (cost.gather(1, label) <= cost.amin(1, keepdim=True) + near).all()
    assert ((found.distances[:, None] - squared.gather(1, label)).abs() <= near).all()
    assert torch.equal(found.counts, torch.bincount(found.labels, minlength=k))
    points = unit(given) if spherical else given.double()
    sums = torch.zeros(k, x.width, dtype=torch.float64).index_add_(0, found.labels, points)
    sizes = torch.zeros(k, x.width, dtype=torch.float64).index_add_(0, found.labels, points.abs())
    steps = 8 + (x.rows if found.sums.dtype == torch.float64 else 0)  # both sums in fp64, each in an order of its own
    assert ((found.sums - sums).abs() <= steps * torch.finfo(found.sums.dtype).eps * sizes).all()


@tries(
    lambda on: dict(
        x=matrices(st.integers(0, on.most(250)), on.dtypes, kinds=("integers", "one-hot"), max_spread=0),
        k=st.integers(1, 20), seed=seeds(), backend=on.backend,
    ),
    always=True,
)  # fmt: skip
def test_ties_go_to_the_lower_centroid(x: Matrix, k, seed, backend):
    """Between integers, with centroids twice and a mean of zero: every backend gives the one right answer."""
    x = Matrix(x.rows, x.width, x.kind, 0, x.dtype, x.layout, x.seed)
    half = x.like(k, seed).float()
    centroids = torch.cat([half, -half, half, -half])
    found = hk.assign_clusters(x.tensor(), centroids, backend=backend)
    squared = (x.tensor().double()[:, None] - centroids.double()).square().sum(2)
    assert torch.equal(found.labels, (squared == squared.amin(1, keepdim=True)).int().argmax(1))
    assert torch.equal(found.distances.double(), squared.amin(1))


@tries(
    lambda on: dict(
        x=matrices(st.integers(1, on.most(250)), on.dtypes), k=st.integers(1, 20), spherical=st.booleans(),
        threads=on.threads, seed=seeds(), native=on.native,
    ),
)  # fmt: skip
def test_batches_threads_and_order_do_not_show(x: Matrix, k, spherical, threads, seed, native):
    given, centroids = x.tensor(), x.like(k, seed)

    def assign(x: Tensor) -> hk.Assignment:
        return hk.assign_clusters(x, centroids, spherical=spherical, backend=native)

    whole = assign(given)
    assert same_bits(with_threads(threads, lambda: assign(given)), whole)
    order = torch.randperm(x.rows, generator=torch.Generator().manual_seed(seed))
    moved = assign(given[order])
    assert torch.equal(moved.labels, whole.labels[order]) and torch.equal(moved.distances, whole.distances[order])
    scaled = hk.assign_clusters(2 * given, 2 * centroids, spherical=spherical, backend=native)
    assert torch.equal(scaled.labels, whole.labels)
    assert torch.equal(scaled.distances, whole.distances * (1 if spherical else 4))
    parts = [assign(part) for part in given.split(max(1, x.rows // 3))]
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert torch.equal(sum(part.counts for part in parts), whole.counts)


@tries(
    lambda on: dict(
        x=matrices(st.integers(1, on.most(120)), on.dtypes, max_spread=3), k=st.integers(1, 12),
        spherical=st.booleans(), init=st.sampled_from(("k-means++", "random")), batch=st.sampled_from((None, 1, 17)),
        seed=seeds(), backend=on.backend,
    ),
)  # fmt: skip
def test_kmeans_is_what_it_says(x: Matrix, k, spherical, init, batch, seed, backend):
    """Also with fewer distinct rows than clusters, rows of zeros, and as many clusters as rows."""
    k, given = min(k, x.rows), x.tensor()
    options = dict(init=init, spherical=spherical, batch_size=batch, seed=seed, iterations=8, backend=backend)
    found = hk.kmeans(given, k, **options)
    again = hk.assign_clusters(given, found.centroids, spherical=False, backend=backend) if not spherical else None
    assert torch.isfinite(found.centroids).all() and found.centroids.shape == (k, x.width)
    assert found.counts.sum() == x.rows and 1 <= found.iterations <= 8
    if again is not None:
        assert torch.equal(again.labels, found.labels)
    # torch's own sums, of the reference, round by the layout.
    again = hk.kmeans(given if backend == "reference" else given.contiguous(), k, **options)
    assert same_bits(again[:3], found[:3])
    if backend == "cpu":
        assert same_bits(with_threads(3, lambda: hk.kmeans(given, k, **options))[:3], found[:3])
    parts = list(given.split(max(1, x.rows // 2)))
    if batch is None and backend != "reference":
        in_parts = hk.kmeans(parts, k, **options)
        scale = given.double().square().sum() + 1e-30
        assert abs(in_parts.inertia - found.inertia) <= 1e-4 * scale
    if not spherical and batch is None:
        longer = hk.kmeans(given, k, **(options | {"iterations": 16}))
        assert longer.inertia <= found.inertia * (1 + 1e-5) + 1e-6 * float(given.double().square().sum())


@tries(
    lambda on: dict(
        x=matrices(st.integers(1, on.most(250)), on.dtypes, max_spread=10), k=st.integers(1, 6),
        fraction=st.sampled_from((0.0, 0.05, 0.5, 0.99)), scope=st.sampled_from(("cluster", "all")),
        spherical=st.booleans(), seed=seeds(), backend=on.backend,
    ),
)  # fmt: skip
def test_no_more_outliers_than_asked_for(x: Matrix, k, fraction, scope, spherical, seed, backend):
    given, centroids = x.tensor(), x.like(k, seed)
    options = dict(fraction=fraction, scope=scope, spherical=spherical, backend=backend)
    limits = hk.outlier_distances(given, centroids, **options)
    assert limits.shape == (k,) and torch.isfinite(limits).all()
    found = hk.assign_clusters(given, centroids, spherical=spherical, backend=backend)
    beyond = found.distances > limits[found.labels]
    groups = found.labels if scope == "cluster" else torch.zeros_like(found.labels)
    outliers, total = (torch.bincount(groups, weights, minlength=k) for weights in (beyond.double(), None))
    assert (outliers <= fraction * total + 1e-9).all()
    # One more only with rows as far away as the threshold says.
    almost = found.distances.double() > limits[found.labels].double() * (1 - 3.2e-5) - 1e-37
    assert (torch.bincount(groups, almost.double(), minlength=k) >= (fraction * total).floor()).all()
    order = torch.randperm(x.rows, generator=torch.Generator().manual_seed(seed))
    if backend != "reference":  # where a product's rounding depends on how many rows it has
        assert torch.equal(hk.outlier_distances(given[order], centroids, **options), limits)
        assert torch.equal(hk.outlier_distances(list(given.split(50)), centroids, **options), limits)
