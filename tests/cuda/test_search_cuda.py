"""The CUDA search kernels on the host, against the reference in fp64.

Integer-valued operands have exact sums in any order: values, ties and bits must then be equal. Others may differ
within the rounding of an fp32 sum.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import hpkernels as hk
from hpkernels.common.bits import unpack
from hpkernels.ops.similarity_search import reference
from tests.guard import before_guard_page

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1, 16), (2, 63, 48), (65, 129, 20), (200, 65, 72))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN or the largest integer: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _whole(n: int, c: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers: many exact ties."""
    return torch.randint(-2, 3, (n, c)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, c", SHAPES)
def test_max(search, dtype, n, m, c):
    queries, keys = _whole(n, c, dtype), _whole(m, c, dtype)
    assert torch.equal(search.max_similarity(queries, keys), reference.max_similarity(queries, keys))
    queries, keys = torch.randn(n, c).to(dtype), torch.randn(m, c).to(dtype)
    exact = reference.max_similarity(queries.double(), keys.double())
    torch.testing.assert_close(search.max_similarity(queries, keys).double(), exact, rtol=1e-5, atol=1e-5)


def test_max_of_nan_is_nan_in_its_row_only(search):
    queries, keys = torch.randn(3, 16), torch.randn(5, 16)
    queries[1, 3] = torch.nan
    assert search.max_similarity(queries, keys).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, c", SHAPES)
def test_pairs(search, dtype, n, m, c):
    x, keys = _whole(n, c, dtype), _whole(m, c, dtype)
    thresholds, key_thresholds = torch.randint(-3, 9, (n,)).float(), torch.randint(-3, 9, (m,)).float()
    thresholds[0] = torch.nan  # selects nothing
    for arguments in ((keys, None), (keys, key_thresholds), (None, None)):
        bits = search.pairs_above(x, thresholds, *arguments)
        assert torch.equal(bits, reference.pairs_above(x, thresholds, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_pairs_are_the_rectangular_ones(search, dtype):
    """s_ij and s_ji are one number in every tile, so a panel of rows against all rows decides alike."""
    x = torch.randn(200, 40).to(dtype)
    own = x.float().square().sum(1) * torch.rand(200)
    bits = search.pairs_above(x, own, None, None)
    dense = unpack(bits, 200)
    assert torch.equal(dense, dense.T) and 0 < dense.sum() < 200 * 199
    panel = unpack(search.pairs_above(x[37:180], own[37:180], x, own), 200)
    panel[torch.arange(143), torch.arange(37, 180)] = False
    assert torch.equal(panel, dense[37:180])


@pytest.mark.parametrize("k", (1, 5, 16, 33, 100, 200, 256, 300))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_topk_with_ties(search, dtype, k):
    queries, keys = _whole(65, 16, dtype), _whole(400, 16, dtype)
    for exclude_self in (False, True):
        found = search.topk_similarity(queries, keys, k, exclude_self, None, None)
        expected = reference.topk_similarity(queries, keys, k, exclude_self, None, None)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("k", (1, 5, 140, 260))
def test_topk_in_ragged_groups(search, k):
    queries, keys = _whole(150, 16, torch.float16), _whole(300, 16, torch.float16)
    query_groups, key_groups = torch.randint(0, 5, (150,)), torch.randint(1, 4, (300,))  # groups 0 and 4 are empty
    found = search.topk_similarity(queries, keys, k, True, query_groups, key_groups)
    expected = reference.topk_similarity(queries, keys, k, True, query_groups, key_groups)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("k", (1, 3, 130))
def test_shares_of_the_keys_are_merged(search, monkeypatch, k):
    queries, keys = _whole(5, 16, torch.bfloat16), _whole(520, 16, torch.bfloat16)
    monkeypatch.setattr(search, "_splits", lambda queries, keys: 3)
    found = search.topk_similarity(queries, keys, k, False, None, None)
    expected = reference.topk_similarity(queries, keys, k, False, None, None)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(search.max_similarity(queries, keys), reference.max_similarity(queries, keys))


@pytest.mark.parametrize("k", (1, 4, 257))
def test_values_without_an_order(search, k):
    """-inf and NaN are never found; -0.0 ties with 0.0."""
    keys = torch.zeros(300, 16)
    keys[:, 0] = torch.where(torch.arange(300) % 2 == 0, -0.0, 0.0)
    keys[:3, 0] = torch.tensor([torch.nan, -torch.inf, 1.0])
    queries = torch.zeros(2, 16)
    queries[:, 0] = 1.0
    values, indices = search.topk_similarity(queries, keys, k, False, None, None)
    assert indices[0].tolist() == list(range(2, 2 + k)) and values[0].tolist() == [1.0] + [0.0] * (k - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_operand_is_read_past_its_end(search, dtype):
    queries, keys = (before_guard_page(_whole(n, 24, dtype)) for n in (130, 258))
    thresholds, key_thresholds = (before_guard_page(torch.zeros(n)) for n in (130, 258))
    assert torch.equal(search.max_similarity(queries, keys), reference.max_similarity(queries, keys))
    for arguments in ((None, None), (keys, None), (keys, key_thresholds)):
        bits = search.pairs_above(queries, thresholds, *arguments)
        assert torch.equal(bits, reference.pairs_above(queries, thresholds, *arguments))
    for k in (1, 7, 257):
        found = search.topk_similarity(queries, keys, k, False, None, None)
        assert torch.equal(found[1], reference.topk_similarity(queries, keys, k, False, None, None)[1])


def test_density_of_groups_is_one_search(search, monkeypatch):
    """All groups in one launch of the k-best kernel; rows, keys and ranks as the reference has them."""
    launches, launch = [], search._launch
    monkeypatch.setattr(search, "_launch", lambda name, *rest: (launches.append(name), launch(name, *rest)))
    features, memory = torch.randn(150, 20), torch.randn(300, 20)
    groups = {"query_groups": torch.arange(150) % 6, "memory_groups": torch.arange(300) % 4}  # two without a row
    density = hk.neighbor_density(features, memory, **groups, backend="cuda")
    assert launches == ["topk_similarity"]
    expected = hk.neighbor_density(features.double(), memory.double(), **groups, backend="reference")
    torch.testing.assert_close(density, expected, rtol=0, atol=3e-7)


def test_density_is_the_published_one(search):
    data = np.load(Path(__file__).parents[1] / "golden" / "dgcl_density_1.npz")
    features, memory = (torch.from_numpy(data[name]) for name in ("features", "memory"))
    density = hk.neighbor_density(features, memory, backend="cuda")
    assert np.abs(density.numpy() - data["density"]).max() <= 3e-7
