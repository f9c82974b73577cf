"""What single backends do on the way to the nearest centroid."""

from __future__ import annotations

import pytest
import torch

from hpkernels.clustering.rows import scores
from hpkernels.ops.cluster_assign import common
from tests.guard import before_guard_page

OP = "cluster_assign"


@pytest.mark.only("cpu")
def test_16_bit_rows_come_in_parts(kernels, monkeypatch):
    x, centroids = torch.randn(500, 16).half(), torch.randn(9, 16)
    operands = (x, centroids, *scores(centroids, False))
    whole = kernels.cluster_assign(*operands)
    monkeypatch.setattr(kernels, "_CONVERTED_NUMBERS", 100 * 16)
    parts = kernels.cluster_assign(*operands)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1]) and torch.equal(whole[3], parts[3])
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_three_numbers_of_16_bits_hold_a_direction(size, kind):
    directions, bias = size * torch.randn(50, 7), torch.randn(50)
    parts, scaled = common.direction_parts(directions, bias, kind)
    scale = (scaled / bias)[0]
    assert all(part.dtype == kind and part.isfinite().all() for part in parts)
    error = sum(part.double() for part in parts) / scale - directions.double()
    assert error.abs().amax() <= 2**-24 * directions.abs().amax()


@pytest.mark.only("host-cuda")
def test_wide_rows(kernels, dtype):
    """More columns than a warp sums, and than one step of the distances."""
    x, centroids = torch.randn(40, 530).to(dtype), torch.randn(5, 530)
    labels, distances, sums, _ = kernels.cluster_assign(x, centroids, *scores(centroids, False))
    exact = (x.double()[:, None] - centroids.double()).square().sum(2).min(1)
    one_hot = torch.nn.functional.one_hot(exact.indices, 5).double()
    assert torch.equal(labels, exact.indices)
    torch.testing.assert_close(distances.double(), exact.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.double(), one_hot.T @ x.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.only("host-cuda")
@pytest.mark.parametrize("n", [127, 128, 129, 700])
def test_sums_of_runs_that_labels_cut_anywhere(kernels, n):
    """Whole numbers have exact sums: clusters without rows, of one row, of many runs."""
    x = torch.randint(-4, 5, (n, 24)).float()
    for labels in (torch.full((n,), 3), torch.arange(n) * 7 % n, (torch.arange(n) > 0) * 5, torch.randint(4, (n,)) * 2):
        k = int(labels.max()) + 2
        sums, counts = kernels._sums(x, labels, k)
        one_hot = torch.nn.functional.one_hot(labels, k)
        assert torch.equal(counts, one_hot.sum(0)) and torch.equal(sums, one_hot.float().T @ x)


@pytest.mark.only("host-cuda")
def test_no_operand_is_read_past_its_end(kernels, dtype):
    x, centroids = torch.randn(130, 24).to(dtype), torch.randn(67, 24)
    operands = [x, centroids, *scores(centroids, False)]
    found = kernels.cluster_assign(*[before_guard_page(t) for t in operands])
    assert all(torch.equal(a, b) for a, b in zip(found, kernels.cluster_assign(*operands), strict=True))
