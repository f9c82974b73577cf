"""kmeans, assign_clusters, outlier_distances: independent formulas, scikit-learn from the same start, edge cases."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import hpkernels as hk
from hpkernels.clustering import rows as _rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def blobs(n, d, k, *, spread=0.4, seed=0, dtype=torch.float32, device="cpu", offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator, dtype=torch.float64)
    x = centres[torch.arange(n) % k] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64) + offset
    return x.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, k", [(1, 1, 1), (97, 5, 3), (500, 33, 60), (300, 16, 260)])
@pytest.mark.parametrize("spherical", [False, True])
def test_assignment_equals_its_definition(n, d, k, dtype, spherical, backend, device):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("it computes in fp32")
    x = blobs(n, d, 7, seed=1, dtype=dtype, device=device)
    centroids = blobs(k, d, 7, seed=2, dtype=dtype, device=device)
    found = hk.assign_clusters(x, centroids, spherical=spherical, backend=backend)
    rows, means = (t.double().cpu().numpy() for t in (x, centroids))
    if spherical:
        rows, means = oracle.unit(rows), oracle.unit(means)
    distances = ((rows[:, None] - means[None]) ** 2).sum(2)
    labels = found.labels.cpu().numpy()
    own = np.take_along_axis(distances, labels[:, None], 1)[:, 0]
    rounding = 1e-12 if dtype == torch.float64 else 2e-6
    if device.type == "cuda" and spherical and dtype in (torch.float16, torch.bfloat16):
        rounding = 2e-2  # unit rows stay 16-bit there
    assert (own <= distances.min(1) + rounding * (1 + distances.max())).all()
    assert np.abs(found.distances.cpu().numpy() - own).max() <= rounding * (1 + own.max())
    one_hot = labels[:, None] == np.arange(k)
    assert np.array_equal(found.counts.cpu().numpy(), one_hot.sum(0))
    assert np.abs(found.sums.double().cpu().numpy() - one_hot.T.astype(float) @ rows).max() <= n * rounding
    assert found.labels.dtype == torch.int64 and found.inertia.item() == pytest.approx(own.sum(), rel=1e-5, abs=1e-5)


def test_ties_go_to_the_lower_index(backend, device):
    x, centroids = blobs(400, 8, 5, device=device), blobs(70, 8, 70, seed=4, device=device)
    first = hk.assign_clusters(x, centroids, backend=backend)
    twice = hk.assign_clusters(x, torch.cat([centroids, centroids, centroids]), backend=backend)
    assert torch.equal(first.labels, twice.labels) and not twice.counts[70:].any()
    zero = hk.assign_clusters(torch.zeros(3, 8, device=device), torch.zeros(5, 8, device=device), backend=backend)
    assert not zero.labels.any()


def test_rows_far_from_zero(backend, device):
    """Rows around 1000 in every column: |mu|^2 - 2 <x, mu> in fp32 would not tell the centroids apart."""
    x = blobs(500, 24, 6, spread=0.3, offset=1000.0, device=device)
    centroids = blobs(6, 24, 6, spread=0.0, offset=1000.0, device=device)
    exact = torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(hk.assign_clusters(x, centroids, backend=backend).labels, exact)


def test_repeatable_bit_for_bit(backend, device):
    x = blobs(20_000, 20, 30, spread=1.0, device=device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found = hk.assign_clusters(x, x[:50], backend=backend)
        clusters = hk.kmeans(x, 12, iterations=5, seed=3, backend=backend)
        torch.set_num_threads(before)
        return *found, clusters.centroids, clusters.labels

    first = run(2)
    for threads in (2, 1, 3) if backend == "cpu" else (2,):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads), strict=True))


def test_assignment_compiles(backend, device):
    x = blobs(50, 6, 4, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, c: hk.assign_clusters(x, c, spherical=True, backend=backend), fullgraph=True, backend="eager"
    )
    expected = hk.assign_clusters(x, x[:5], spherical=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, x[:5]), expected))


def direct_lloyd(x, centroids, iterations):
    for _ in range(iterations):
        labels = ((x[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
        centroids = np.stack(
            [x[labels == k].mean(0) if (labels == k).any() else centroids[k] for k in range(len(centroids))]
        )
    return centroids


@pytest.mark.parametrize("iterations", [1, 4])
def test_lloyd_equals_its_definition(iterations, backend, device):
    x = blobs(300, 6, 5, spread=1.0, device=device)
    result = hk.kmeans(x, 4, init=x[:4], iterations=iterations, tolerance=0, backend=backend)
    expected = direct_lloyd(x.double().cpu().numpy(), x[:4].double().cpu().numpy(), iterations)
    assert np.abs(result.centroids.cpu().numpy() - expected).max() <= 1e-5
    assert result.iterations == iterations and result.counts.sum() == 300 and result.labels.shape == (300,)
    again = hk.assign_clusters(x, result.centroids, backend=backend)
    assert torch.equal(again.labels, result.labels) and result.inertia == pytest.approx(again.inertia.item(), rel=1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype, offset", [(torch.float64, 0.0), (torch.float32, 0.0), (torch.float32, 50.0)])
def test_scikit_learn_from_the_same_start(tolerance, dtype, offset, backend, device):
    cluster = pytest.importorskip("sklearn.cluster")
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("it computes in fp32")
    x = blobs(3000, 12, 9, spread=0.8, dtype=dtype, offset=offset)
    theirs = cluster.KMeans(14, init=x[:14].numpy(), n_init=1, tol=tolerance, max_iter=300, algorithm="lloyd")
    theirs.fit(x.numpy())
    ours = hk.kmeans(x.to(device), 14, init=x[:14].to(device), iterations=300, tolerance=tolerance, backend=backend)
    assert np.array_equal(ours.labels.cpu().numpy(), theirs.labels_)
    assert ours.iterations == theirs.n_iter_
    rel = 1e-10 if dtype == torch.float64 else 1e-5
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=rel)
    assert np.abs(ours.centroids.cpu().numpy() - theirs.cluster_centers_).max() <= rel * (10 + 10 * offset)


def test_scikit_learn_when_a_cluster_runs_empty(backend, device):
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(200, 3, 4, spread=0.5)
    start = torch.cat([x[:4], torch.full((1, 3), 100.0)])
    theirs = cluster.KMeans(5, init=start.numpy(), n_init=1, tol=0).fit(x.numpy())
    ours = hk.kmeans(x.to(device), 5, init=start.to(device), tolerance=0, backend=backend)
    assert np.array_equal(ours.labels.cpu().numpy(), theirs.labels_) and (ours.counts > 0).all()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_separated_blobs_are_found(spherical, batch_size, backend, device):
    x = blobs(600, 16, 6, spread=0.05, device=device)
    result = hk.kmeans(
        x, 6, spherical=spherical, batch_size=batch_size, restarts=4, iterations=20, seed=1, backend=backend
    )
    assert (result.counts == 100).all() and len(set(result.labels[:6].tolist())) == 6
    assert torch.equal(result.labels.view(-1, 6), result.labels[:6].expand(100, 6))
    if spherical:
        torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(6, device=device), rtol=1e-6, atol=0)
        chord = 2 - 2 * torch.nn.functional.cosine_similarity(x, result.centroids[result.labels], dim=1).sum()
        assert result.inertia == pytest.approx((chord + 2 * 599).item(), abs=1e-3)


def test_spherical_ignores_lengths(backend, device):
    x = blobs(300, 10, 5, spread=0.3, device=device)
    lengths = torch.rand(300, 1, device=device) + 0.5
    plain, scaled = (hk.kmeans(rows, 5, spherical=True, seed=2, backend=backend) for rows in (x, x * lengths))
    assert torch.equal(plain.labels, scaled.labels)


def test_more_restarts_are_no_worse(backend, device):
    x = blobs(400, 4, 20, spread=0.3, device=device)
    inertia = [hk.kmeans(x, 20, restarts=n, seed=5, backend=backend).inertia for n in (1, 3, 8)]
    assert inertia[0] >= inertia[1] >= inertia[2] and inertia[0] > inertia[2]


def test_mini_batch_is_the_running_mean(backend, device):
    """One pass over separated rows: each centroid ends at the mean of its rows, whatever the batches."""
    x = blobs(240, 5, 3, spread=0.05, device=device)
    result = hk.kmeans(x, 3, init=x[:3], batch_size=50, iterations=1, backend=backend)
    means = torch.stack([x[k::3].mean(0) for k in range(3)])
    torch.testing.assert_close(result.centroids, means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 100])
@pytest.mark.parametrize("spherical", [False, True])
def test_batches_are_one_set_of_rows(spherical, batch_size, monkeypatch, backend, device):
    monkeypatch.setattr(_rows, "_ROWS", 100)
    x = blobs(500, 7, 4, spread=0.9, device=device)
    options = {"spherical": spherical, "batch_size": batch_size, "iterations": 6, "seed": 4, "backend": backend}
    whole, batches = hk.kmeans(x, 5, **options), hk.kmeans(list(x.split(100)), 5, **options)
    assert torch.equal(whole.labels, batches.labels) and torch.equal(whole.centroids, batches.centroids)


def test_fewer_different_rows_than_clusters(backend, device):
    for batch_size in (None, 4):
        same = hk.kmeans(torch.ones(9, 4, device=device), 3, batch_size=batch_size, backend=backend)
        assert torch.isfinite(same.centroids).all() and same.inertia == 0.0
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)
    one = hk.kmeans(opposite, 1, spherical=True, backend=backend)  # directions that cancel
    assert torch.isfinite(one.centroids).all()


def test_random_start_and_seed(backend, device):
    x = blobs(200, 4, 3, spread=2.0, device=device)
    runs = [hk.kmeans(x, 6, init="random", iterations=1, seed=s, backend=backend).centroids for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("scope", ["cluster", "all"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.99])
def test_outlier_distances(scope, spherical, fraction, backend, device):
    x = blobs(2000, 8, 4, spread=0.5, device=device)
    centroids = hk.kmeans(x, 4, spherical=spherical, backend=backend).centroids
    thresholds = hk.outlier_distances(
        x.split(300), centroids, fraction=fraction, scope=scope, spherical=spherical, backend=backend
    )
    found = hk.assign_clusters(x, centroids, spherical=spherical, backend=backend)
    beyond = found.distances > thresholds[found.labels]
    near = (found.distances - thresholds[found.labels]).abs() <= 2e-5 * thresholds[found.labels]
    for group in range(4) if scope == "cluster" else [None]:
        own = torch.ones_like(beyond) if group is None else found.labels == group
        allowed = int(fraction * own.sum())
        assert allowed - (near & own).sum() <= (beyond & own).sum() <= allowed


def test_outlier_distances_of_empty_clusters_and_zero_distances(backend, device):
    x = torch.ones(10, 3, device=device)
    thresholds = hk.outlier_distances(x, torch.stack([x[0], x[0] + 100]), backend=backend)
    assert thresholds.shape == (2,) and torch.isfinite(thresholds).all() and thresholds[1] == 0


X = torch.randn(12, 3)
ERRORS = [
    (lambda: hk.assign_clusters(X, X[:0]), ValueError, "centroids: expected at least one row"),
    (lambda: hk.assign_clusters(X, X[:2, :2]), ValueError, "centroids: expected vectors of length 3 as in x"),
    (lambda: hk.assign_clusters(X.int(), X[:2]), TypeError, "x: expected float16"),
    (lambda: hk.assign_clusters(X / 0, X[:2]), ValueError, "x: expected finite numbers"),
    (lambda: hk.assign_clusters(X * torch.nan, X[:2], spherical=True), ValueError, "x: expected finite"),
    (lambda: hk.assign_clusters(X, X[:2], backend="metal"), ValueError, "backend: 'metal' cannot be used here"),
    (lambda: hk.kmeans(X, 13), ValueError, "x: expected at least k = 13 rows, got 12"),
    (lambda: hk.kmeans(X, 0), ValueError, "k: expected at least 1, got 0"),
    (lambda: hk.kmeans(X, 2.0), TypeError, "k: expected an int, got 2.0"),
    (lambda: hk.kmeans(X, 2, init="best"), ValueError, "init: expected one of 'k-means\\+\\+', 'random', got 'best'"),
    (lambda: hk.kmeans(X, 2, init=X[:3]), ValueError, r"init: expected shape \(2, 3\) on cpu"),
    (lambda: hk.kmeans(X, 2, init=X[:2], restarts=2), ValueError, "restarts: expected 1 with centroids in init, got 2"),
    (lambda: hk.kmeans(X, 2, iterations=0), ValueError, "iterations: expected at least 1, got 0"),
    (lambda: hk.kmeans(X, 2, batch_size=-1), ValueError, "batch_size: expected at least 1, got -1"),
    (lambda: hk.kmeans(X, 2, tolerance=-1), ValueError, "tolerance: expected a finite number >= 0, got -1"),
    (lambda: hk.kmeans(X, 2, seed=None), TypeError, "seed: expected an int, got None"),
    (lambda: hk.kmeans(iter([X]), 2), TypeError, "x: expected a tensor or batches that can be iterated again"),
    (lambda: hk.kmeans([], 2), ValueError, "x: expected at least one batch"),
    (lambda: hk.kmeans([X, X[:, :2]], 2), ValueError, "x: expected batches of 3 columns"),
    (lambda: hk.kmeans(X * torch.inf, 2), ValueError, "x: expected finite"),
    (lambda: hk.kmeans(X * torch.nan, 2, spherical=True), ValueError, "x: expected finite"),
    (
        lambda: hk.outlier_distances(X, X[:2], fraction=1.0),
        ValueError,
        r"fraction: expected a number in \[0, 1\), got 1.0",
    ),
    (lambda: hk.outlier_distances(X, X[:2], scope="global"), ValueError, "scope: expected one of 'cluster', 'all'"),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
