"""Assignment to the nearest centroid on the CPU against fp64, per instruction set."""

import pytest
import torch

from hpkernels.clustering.rows import scores
from hpkernels.ops.cluster_assign import cpu as native
from hpkernels.ops.cluster_assign import reference


def assign(x, centroids):
    return native.cluster_assign(x, centroids, *scores(centroids, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n, d, k", [(1, 1, 1), (95, 7, 1), (97, 33, 5), (1000, 16, 191), (700, 20, 400), (6200, 8, 3)])
def test_equals_the_reference(isa, n, d, k, dtype):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    centroids = torch.randn(k, d, generator=generator, dtype=torch.float64).to(working)
    labels, distances, sums, counts = assign(x, centroids)
    exact = reference.cluster_assign(x.double(), centroids.double(), *scores(centroids.double(), False))
    own = (x.double() - centroids.double()[labels]).square().sum(1)
    rounding = 1e-13 if dtype == torch.float64 else 1e-6
    assert (own <= exact[1] + rounding * (1 + own)).all() and ((distances - own).abs() <= rounding * (1 + own)).all()
    one_hot = torch.nn.functional.one_hot(labels, k).double()
    torch.testing.assert_close(sums.double(), one_hot.T @ x.double(), rtol=rounding, atol=rounding)
    assert torch.equal(counts, one_hot.sum(0).long()) and sums.dtype == distances.dtype == working


def test_ties_go_to_the_lower_index(isa):
    x, centroids = torch.randn(200, 8), torch.randn(130, 8)
    assert torch.equal(assign(x, centroids)[0], assign(x, centroids.repeat(3, 1))[0])


def test_16_bit_rows_come_in_parts(monkeypatch):
    x, centroids = torch.randn(500, 16).half(), torch.randn(9, 16)
    whole = assign(x, centroids)
    monkeypatch.setattr(native, "_CONVERTED_NUMBERS", 100 * 16)
    parts = assign(x, centroids)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1]) and torch.equal(whole[3], parts[3])
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_named(isa, bad):
    x = torch.randn(300, 20)
    x[299, 19] = bad
    with pytest.raises(ValueError, match="^x: expected finite numbers, got 1 NaN or infinite"):
        assign(x, torch.randn(4, 20))
    with pytest.raises(ValueError, match="^x: expected numbers whose squared distances are finite"):
        assign(torch.full((3, 2), 1e30), torch.zeros(2, 2))
