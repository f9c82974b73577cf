"""The CUDA assignment to clusters on the host, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels.clustering.rows import scores
from hpkernels.ops.cluster_assign import reference
from tests.backend_checks import check_assignment
from tests.cuda.guard import before_guard_page

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, k", [(1, 1, 1), (70, 16, 3), (128, 40, 64), (131, 72, 65), (300, 20, 150), (900, 8, 2)])
def test_equals_the_reference(cluster_assign, n, d, k, dtype):
    check_assignment(cluster_assign, n, d, k, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows(cluster_assign, dtype):
    """More columns than a warp sums, and than one step of the distances."""
    x, centroids = torch.randn(40, 530).to(dtype), torch.randn(5, 530)
    labels, distances, sums, _ = cluster_assign.cluster_assign(x, centroids, *scores(centroids, False))
    exact = reference.cluster_assign(x.double(), centroids.double(), *scores(centroids.double(), False))
    assert torch.equal(labels, exact[0])
    torch.testing.assert_close(distances.double(), exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.double(), exact[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("k", [2, 40, 70])
def test_ties_go_to_the_lower_index(cluster_assign, k):
    centroids = torch.randn(k, 16).repeat(3, 1)
    labels, *_ = cluster_assign.cluster_assign(torch.randn(290, 16).half(), centroids, *scores(centroids, False))
    assert labels.max() < k


@pytest.mark.parametrize("n", [127, 128, 129, 700])
def test_sums_of_runs_that_labels_cut_anywhere(cluster_assign, n):
    """Whole numbers have exact sums: clusters without rows, of one row, of many runs."""
    x = torch.randint(-4, 5, (n, 24)).float()
    for labels in (torch.full((n,), 3), torch.arange(n) * 7 % n, (torch.arange(n) > 0) * 5, torch.randint(4, (n,)) * 2):
        k = int(labels.max()) + 2
        sums, counts = cluster_assign._sums(x, labels, k)
        one_hot = torch.nn.functional.one_hot(labels, k)
        assert torch.equal(counts, one_hot.sum(0)) and torch.equal(sums, one_hot.float().T @ x)


def test_bad_numbers_are_not_hidden(cluster_assign):
    x, centroids = torch.randn(40, 16), torch.randn(5, 16)
    x[7, 3], x[9, 0] = torch.nan, torch.inf
    labels, distances, _, _ = cluster_assign.cluster_assign(x, centroids, *scores(centroids, False))
    assert not distances[[7, 9]].isfinite().any() and distances.isfinite().sum() == 38
    assert ((labels >= 0) & (labels < 5)).all()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_nothing(cluster_assign, shape):
    x, centroids = torch.zeros(shape), torch.zeros(3, shape[1])
    labels, distances, sums, counts = cluster_assign.cluster_assign(x, centroids, centroids, torch.zeros(3))
    assert not labels.any() and not distances.any() and not sums.any() and counts.tolist() == [shape[0], 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_operand_is_read_past_its_end(cluster_assign, dtype):
    x, centroids = torch.randn(130, 24).to(dtype), torch.randn(67, 24)
    operands = [x, centroids, *scores(centroids, False)]
    found = cluster_assign.cluster_assign(*[before_guard_page(t) for t in operands])
    assert all(torch.equal(a, b) for a, b in zip(found, cluster_assign.cluster_assign(*operands), strict=True))


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_equals_the_reference(cluster_assign, spherical):
    x = torch.randn(5, 12)[torch.arange(150) % 5] + 0.2 * torch.randn(150, 12)
    options = {"spherical": spherical, "seed": 1, "iterations": 8}
    ours, theirs = (hk.kmeans(x, 5, **options, backend=backend) for backend in ("cuda", "reference"))
    assert torch.equal(ours.labels, theirs.labels)
    torch.testing.assert_close(ours.centroids, theirs.centroids, rtol=1e-5, atol=1e-6)
