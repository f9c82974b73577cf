"""Assignment to the nearest centroid against the reference in fp64, and the public functions on top of it."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels.clustering.rows import scores
from hpkernels.ops.cluster_assign import common
from hpkernels.ops.cluster_assign import triton as kernels
from tests.backend_checks import check_assignment


@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 16, 3), (130, 65, 70), (260, 128, 64)])
def test_cluster_assign(shape, dtype, splits):
    check_assignment(kernels, *shape, dtype)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_three_numbers_of_16_bits_hold_a_direction(size, kind):
    directions, bias = size * torch.randn(50, 7), torch.randn(50)
    parts, scaled = common.direction_parts(directions, bias, kind)
    scale = (scaled / bias)[0]
    assert all(part.dtype == kind and part.isfinite().all() for part in parts)
    error = sum(part.double() for part in parts) / scale - directions.double()
    assert error.abs().amax() <= 2**-24 * directions.abs().amax()


def test_ties_go_to_the_lower_index():
    """Of whole numbers, whose products are exact: NumPy's, in the interpreter, round by the place of a column."""
    x, half = (torch.randint(-8, 9, (n, 16)).float() for n in (90, 20))
    centroids = torch.cat([half, -half]).repeat(3, 1)  # their mean is zero
    labels, *_ = kernels.cluster_assign(x, centroids, *scores(centroids, False))
    assert labels.max() < 40


def test_bad_numbers_are_not_hidden():
    x, centroids = torch.randn(40, 16), torch.randn(5, 16)
    x[7, 3], x[9, 0] = torch.nan, torch.inf
    labels, distances, _, _ = kernels.cluster_assign(x, centroids, *scores(centroids, False))
    assert not distances[[7, 9]].isfinite().any() and distances.isfinite().sum() == 38
    assert ((labels >= 0) & (labels < 5)).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_equals_the_reference(spherical):
    x = torch.randn(5, 12)[torch.arange(150) % 5] + 0.2 * torch.randn(150, 12)
    ours, theirs = (
        hk.kmeans(x, 5, spherical=spherical, seed=1, iterations=8, backend=b) for b in ("triton", "reference")
    )
    assert torch.equal(ours.labels, theirs.labels)
    torch.testing.assert_close(ours.centroids, theirs.centroids, rtol=1e-5, atol=1e-6)
