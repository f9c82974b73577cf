"""What is the CUDA searches' own: shares of the keys, numbers without an order, ends of operands, launches."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels.ops.similarity_search import reference
from tests.guard import before_guard_page
from tests.ops.similarity_search.searches import same, whole

OP = "similarity_search"
pytestmark = pytest.mark.only("host-cuda")


@pytest.mark.parametrize("k", (1, 3, 130))
def test_shares_of_the_keys_are_merged(kernels, monkeypatch, k):
    queries, keys = whole(5, 16, torch.bfloat16), whole(520, 16, torch.bfloat16)
    monkeypatch.setattr(kernels, "_splits", lambda queries, keys: 3)
    found = kernels.topk_similarity(queries, keys, k, False, None, None)
    assert same(found, reference.topk_similarity(queries, keys, k, False, None, None))
    assert torch.equal(kernels.max_similarity(queries, keys), reference.max_similarity(queries, keys))


@pytest.mark.only("cuda")
@pytest.mark.parametrize("k", (1, 4, 257))
def test_values_without_an_order(kernels, k):
    """-inf and NaN are never found; -0.0 ties with 0.0."""
    keys = torch.zeros(300, 16)
    keys[:, 0] = torch.where(torch.arange(300) % 2 == 0, -0.0, 0.0)
    keys[:3, 0] = torch.tensor([torch.nan, -torch.inf, 1.0])
    queries = torch.zeros(2, 16)
    queries[:, 0] = 1.0
    values, indices = kernels.topk_similarity(queries, keys, k, False, None, None)
    assert indices[0].tolist() == list(range(2, 2 + k)) and values[0].tolist() == [1.0] + [0.0] * (k - 1)


def test_no_operand_is_read_past_its_end(kernels, dtype):
    queries, keys = (before_guard_page(whole(n, 24, dtype)) for n in (130, 258))
    thresholds, key_thresholds = (before_guard_page(torch.zeros(n)) for n in (130, 258))
    assert torch.equal(kernels.max_similarity(queries, keys), reference.max_similarity(queries, keys))
    for arguments in ((None, None), (keys, None), (keys, key_thresholds)):
        bits = kernels.pairs_above(queries, thresholds, *arguments)
        assert torch.equal(bits, reference.pairs_above(queries, thresholds, *arguments))
    for k in (1, 7, 257):
        found = kernels.topk_similarity(queries, keys, k, False, None, None)
        assert torch.equal(found[1], reference.topk_similarity(queries, keys, k, False, None, None)[1])


def test_density_of_groups_is_one_search(kernels, monkeypatch):
    """All groups in one launch of the k-best kernel."""
    launches, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda name, *rest: (launches.append(name), launch(name, *rest)))
    features, memory = torch.randn(150, 20), torch.randn(300, 20)
    groups = {"query_groups": torch.arange(150) % 6, "memory_groups": torch.arange(300) % 4}
    hk.neighbor_density(features, memory, **groups, backend="cuda")
    assert launches == ["topk_similarity"]
