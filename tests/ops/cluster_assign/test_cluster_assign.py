"""Assignment to the nearest centroid against the reference in fp64, and k-means on top of it."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels.clustering.rows import scores
from hpkernels.ops.cluster_assign import reference
from tests.ops.ways import moved

OP = "cluster_assign"


def assign(kernels, x, centroids):
    return kernels.cluster_assign(x, centroids, *scores(centroids, False))


@pytest.mark.cases(
    "n, d, k",
    [(1, 1, 1), (70, 16, 3), (95, 7, 1), (97, 33, 5), (130, 65, 70)],
    reference=[(1000, 16, 191)],
    cpu=[(1000, 16, 191), (700, 20, 400), (6200, 8, 3)],
    cuda=[(128, 40, 64), (131, 72, 65), (300, 20, 150), (900, 8, 2), (40, 530, 5)],
    triton=[(260, 128, 64)],
)
def test_nearest_centroids(kernels, n, d, k, dtype, processors):
    """The nearest by fp64, sums and counts of its own labels, the same bits again."""
    processors(8)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    x, centroids = torch.randn(n, d, dtype=torch.float64).to(dtype), torch.randn(k, d, dtype=torch.float64).to(working)
    found = labels, distances, sums, counts = assign(kernels, x, centroids)
    exact = reference.cluster_assign(x.double(), centroids.double(), *scores(centroids.double(), False))
    own = (x.double() - centroids.double()[labels]).square().sum(1)
    rounding = 1e-13 if dtype == torch.float64 else 1e-6
    assert (own <= exact[1] + rounding * (1 + own)).all() and ((distances - own).abs() <= rounding * (1 + own)).all()
    one_hot = torch.nn.functional.one_hot(labels, k).double()
    torch.testing.assert_close(sums.double(), one_hot.T @ x.double(), rtol=rounding, atol=10 * rounding)
    assert torch.equal(counts, one_hot.sum(0).long()) and labels.dtype == torch.int64
    assert sums.dtype == distances.dtype == working
    assert all(torch.equal(a, b) for a, b in zip(assign(kernels, x, centroids), found, strict=True))


@pytest.mark.cases("n, k", [(90, 40), (200, 130)], cuda=[(290, 2), (290, 40), (290, 70)])
def test_ties_go_to_the_lower_index(kernels, n, k):
    """Of whole numbers, whose products are exact: torch's, and NumPy's in Triton's interpreter, round by the place of
    a column."""
    x, half = (torch.randint(-8, 9, (rows, 16)).float() for rows in (n, k // 2))
    centroids = torch.cat([half, -half])  # their mean is zero
    labels = assign(kernels, x, centroids.repeat(3, 1))[0]
    assert labels.max() < k and torch.equal(labels, assign(kernels, x, centroids)[0])


@pytest.mark.only("cpu", "cuda")
@pytest.mark.cases("n, d, k", cpu=[(200, 8, 130)], cuda=[(290, 16, 2), (290, 16, 40), (290, 16, 70)])
def test_ties_of_any_numbers_go_to_the_lower_index(kernels, n, d, k, dtype):
    centroids = torch.randn(k, d, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(n, d).to(dtype)
    assert torch.equal(assign(kernels, x, centroids)[0], assign(kernels, x, centroids.repeat(3, 1))[0])


@pytest.mark.only("cpu")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_named(kernels, bad):
    x = torch.randn(300, 20)
    x[299, 19] = bad
    with pytest.raises(ValueError, match="^x: expected finite numbers, got 1 NaN or infinite"):
        assign(kernels, x, torch.randn(4, 20))
    with pytest.raises(ValueError, match="^x: expected numbers whose squared distances are finite"):
        assign(kernels, torch.full((3, 2), 1e30), torch.zeros(2, 2))


@pytest.mark.only("reference", "cuda", "triton")
def test_bad_numbers_are_not_hidden(kernels):
    """Where nothing can be raised, and where the op looks at them first."""
    x, centroids = torch.randn(40, 16), torch.randn(5, 16)
    x[7, 3], x[9, 0] = torch.nan, torch.inf
    labels, distances, _, _ = assign(kernels, x, centroids)
    assert not distances[[7, 9]].isfinite().any() and distances.isfinite().sum() == 38
    assert ((labels >= 0) & (labels < 5)).all()


@pytest.mark.cases("shape", [(0, 5)], cpu=[(4, 0)], cuda=[(4, 0)])
def test_nothing(kernels, shape):
    x, centroids = torch.zeros(shape), torch.zeros(3, shape[1])
    labels, distances, sums, counts = kernels.cluster_assign(x, centroids, centroids, torch.zeros(3))
    assert not labels.any() and not distances.any() and not sums.any() and counts.tolist() == [shape[0], 0, 0]


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_equals_the_reference(kernels, way, spherical):
    x = torch.randn(5, 12)[torch.arange(150) % 5] + 0.2 * torch.randn(150, 12)
    options = {"spherical": spherical, "seed": 1, "iterations": 8}
    ours = hk.kmeans(moved(x, way.device), 5, **options, backend=way.backend)
    theirs = hk.kmeans(x, 5, **options, backend="reference")
    assert torch.equal(ours.labels.cpu(), theirs.labels)
    torch.testing.assert_close(ours.centroids.cpu(), theirs.centroids, rtol=1e-5, atol=1e-6)
