"""The searches against fp64; of whole numbers, whose sums are exact in any order, they equal the definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import hpkernels as hk
from tests.ops.shapes import EVERY
from tests.ops.similarity_search.searches import band, limits, same, topk, unit_rows, unpack, whole
from tests.ops.ways import moved

OP = "similarity_search"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = [(1, 1, 16), (2, 63, 48), (65, 129, 20), (200, 65, 72)]
SHAPES = [(0, 5, 4), (1, 1, 1), (2, 63, 16), (63, 2, 48), (65, 129, 384), (129, 65, 520), (193, 385, 31)]
SHAPES += [(196, 784, 384), (784, 196, 16)]


def with_dtypes(shapes, *dtypes):
    return [(*shape, dtype) for shape in shapes for dtype in dtypes]


def of_interpreter(keys):
    """The sizes that its time allows, with keys(n) keys."""
    return [pytest.param(n, keys(n), *rest, marks=marks, id=f"{label}-{keys(n)}") for (n, *rest), marks, label in EVERY]


ON_FAST_WAYS = dict(
    reference=with_dtypes(SMALL + SHAPES, FP32, FP64),
    cpu=with_dtypes(SMALL + SHAPES, FP32, FP64, BF16, FP16),
    cuda=with_dtypes(SMALL, BF16, FP16, FP32),
)


@pytest.mark.cases("n, m, d, dtype", [], **ON_FAST_WAYS, triton=of_interpreter(lambda n: max(1, n // 2 + 1)))
def test_max(kernels, n, m, d, dtype):
    queries, keys = unit_rows(n, d, dtype), unit_rows(m, d, dtype, seed=1)
    exact = (queries.double() @ keys.double().T).amax(1)
    torch.testing.assert_close(kernels.max_similarity(queries, keys).double(), exact, atol=band(dtype, d), rtol=0)
    queries, keys = whole(n, d, dtype), whole(m, d, dtype)
    exact = (queries.double() @ keys.double().T).amax(1)
    assert torch.equal(kernels.max_similarity(queries, keys).double(), exact)


def ranks(cases):
    """Each with one, some and all of the keys."""
    return [(*case, k, False) for case in cases for k in sorted({1, min(5, case[1]), case[1]})]


@pytest.mark.cases(
    "n, m, d, dtype, k, exclude_self",
    **{backend: ranks(cases) for backend, cases in ON_FAST_WAYS.items()},
    triton=[
        pytest.param(n, n + 3, d, dtype, min(k, n + 2), True, marks=marks, id=f"{label}-top{k}")
        for (n, d, dtype), marks, label in EVERY
        for k in (1, 6, 40)
        if k < 40 or n <= 129  # which pays for each entry of a list
    ],
)
def test_topk(kernels, n, m, d, dtype, k, exclude_self):
    queries, keys, near = unit_rows(n, d, dtype), unit_rows(m, d, dtype, seed=1), band(dtype, d) + 1e-7
    s = queries.double() @ keys.double().T
    values, indices = kernels.topk_similarity(queries, keys, k, exclude_self, None, None)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    torch.testing.assert_close(values, topk(s, k, exclude_self)[0], atol=near, rtol=0)
    torch.testing.assert_close(s.gather(1, indices), values.double(), atol=near, rtol=0)
    assert (indices.sort(1).values.diff(dim=1) > 0).all()
    assert not exclude_self or (indices != torch.arange(n)[:, None]).all()


@pytest.mark.only("reference", "cpu", "cuda", "gpu-triton")
@pytest.mark.parametrize("k", (1, 5, 16, 33, 100, 200, 256, 300))
@pytest.mark.cases("dtype", [BF16, FP32])
def test_topk_ties_go_to_the_lower_index(kernels, dtype, k):
    queries, keys = whole(65, 16, dtype), whole(400, 16, dtype)
    for exclude_self in (False, True):
        found = kernels.topk_similarity(queries, keys, k, exclude_self, None, None)
        assert same(found, topk(queries.double() @ keys.double().T, k, exclude_self))


@pytest.mark.only("reference", "cpu", "cuda", "gpu-triton")
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", (1, 5, 140, 260))
def test_topk_in_ragged_groups(kernels, k, exclude_self):
    queries, keys = whole(150, 16, FP16), whole(300, 16, FP16)
    groups = torch.randint(0, 5, (150,)), torch.randint(1, 4, (300,))  # groups 0 and 4 are empty
    found = kernels.topk_similarity(queries, keys, k, exclude_self, *groups)
    assert same(found, topk(queries.double() @ keys.double().T, k, exclude_self, *groups))


@pytest.mark.only("reference", "cuda", "triton")
def test_max_of_nan_is_nan_in_its_row_only(kernels):
    """Where nothing can be raised, and where the op looks at numbers first."""
    queries, keys = torch.randn(5, 16), torch.randn(9, 16)
    queries[2, 3] = torch.nan
    assert kernels.max_similarity(queries, keys).isnan().tolist() == [False, False, True, False, False]


def test_max_of_mixed_dtypes_and_of_splits(kernels, processors):
    processors(8)
    queries, keys = unit_rows(65, 48, FP16), unit_rows(700, 48)
    exact = (queries.double() @ keys.double().T).amax(1)
    torch.testing.assert_close(kernels.max_similarity(queries, keys).double(), exact, atol=band(FP32, 48), rtol=0)


@pytest.mark.cases(
    "n, m, d, dtype",
    **ON_FAST_WAYS,
    triton=of_interpreter(lambda n: n // 2 + 70),
)
def test_pairs(kernels, way, n, m, d, dtype):
    """Wherever s_ij is not within rounding of its limit. Triton's with keys of another dtype."""
    working, near = FP64 if dtype == FP64 else FP32, band(dtype, d)
    x, keys = unit_rows(n, d, dtype), unit_rows(m, d, FP16 if way.backend == "triton" else dtype, seed=1)
    thresholds, key_thresholds = (0.1 * torch.randn(rows, dtype=working) for rows in (n, m))
    for others, theirs in ((keys, None), (keys, key_thresholds), (None, None)):
        s = x.double() @ (x if others is None else others).double().T
        limit = limits(s, thresholds, thresholds if others is None else theirs)
        if others is None:
            limit = limit.clone().fill_diagonal_(torch.inf)
        found, clear = unpack(kernels.pairs_above(x, thresholds, others, theirs), s.shape[1]), (s - limit).abs() > near
        assert torch.equal(found[clear], (s > limit)[clear])
        assert clear.double().mean() > 0.9 or s.numel() < 10
        assert others is not None or torch.equal(found, found.T)


@pytest.mark.cases("n, m, d", SMALL)
def test_pairs_of_whole_numbers(kernels, n, m, d, dtype):
    x, keys = whole(n, d, dtype), whole(m, d, dtype)
    thresholds, key_thresholds = torch.randint(-3, 9, (n,)).float(), torch.randint(-3, 9, (m,)).float()
    special = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf])[:n]  # NaN selects nothing, -0.0 is 0.0
    thresholds[: len(special)] = special
    for others, theirs in ((keys, None), (keys, key_thresholds), (None, None)):
        s = x.double() @ (x if others is None else others).double().T
        expected = s > limits(s, thresholds, thresholds if others is None else theirs)
        if others is None:
            expected.fill_diagonal_(False)
        assert torch.equal(unpack(kernels.pairs_above(x, thresholds, others, theirs), s.shape[1]), expected)


@pytest.mark.only("cpu", "cuda")
def test_symmetric_pairs_are_the_rectangular_ones(kernels, dtype):
    """s_ij and s_ji are one number in every tile, so a panel of rows against all rows decides alike."""
    x = torch.randn(200, 40).to(dtype)
    own = x.to(FP64 if dtype == FP64 else FP32).square().sum(1) * torch.rand(200)
    dense = unpack(kernels.pairs_above(x, own, None, None), 200)
    assert torch.equal(dense, dense.T) and 0 < dense.sum() < 200 * 199
    panel = unpack(kernels.pairs_above(x[37:180], own[37:180], x, own), 200)
    panel[torch.arange(143), torch.arange(37, 180)] = False
    assert torch.equal(panel, dense[37:180])


def test_thresholds_may_be_infinite_or_nan(kernels):
    x = unit_rows(140, 20)
    thresholds = torch.full((140,), torch.inf)
    thresholds[3], thresholds[139] = -torch.inf, torch.nan
    found = unpack(kernels.pairs_above(x, thresholds, None, None), 140)
    expected = torch.zeros(140, 140, dtype=torch.bool)
    expected[3], expected[:, 3] = True, True
    expected[3, 3] = expected[3, 139] = expected[139, 3] = False
    assert torch.equal(found, expected)
    found = unpack(kernels.pairs_above(x, thresholds, x, None), 140)
    assert torch.equal(found.any(1).nonzero().flatten(), torch.tensor([3]))


@pytest.mark.only("reference", "cuda", "triton")
def test_nan_thresholds_and_products_compare_false(kernels):
    x, thresholds = unit_rows(40, 16), torch.full((40,), -2.0)
    thresholds[3], x[5, 0] = torch.nan, torch.nan
    chosen = unpack(kernels.pairs_above(x, thresholds, None, None), 40)
    expected = ~torch.eye(40, dtype=torch.bool)
    for bad in (3, 5):
        expected[bad], expected[:, bad] = False, False
    assert torch.equal(chosen, expected)


@pytest.mark.only("cpu", "cuda", "triton")
@pytest.mark.cases("n, m", [(50, 120)], cpu=[(150, 300)], cuda=[(150, 300)])
def test_density_of_groups_equals_the_reference(kernels, way, n, m):
    """Two of the groups without a row."""
    features, memory = torch.randn(n, 20), torch.randn(m, 20)
    groups = {"query_groups": torch.arange(n) % 6, "memory_groups": torch.arange(m) % 4}
    expected = hk.neighbor_density(features.double(), memory.double(), **groups, backend="reference")
    on_device = {name: moved(ids, way.device) for name, ids in groups.items()}
    ours = hk.neighbor_density(*moved((features, memory), way.device), **on_device, backend=way.backend)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=3e-7, check_dtype=False)


@pytest.mark.only("cpu", "cuda", "gpu-triton")
def test_density_is_the_published_one(kernels, way):
    data = np.load(Path(__file__).resolve().parents[2] / "golden" / "dgcl_density_1.npz")
    operands = moved(tuple(torch.from_numpy(data[name]) for name in ("features", "memory")), way.device)
    density = hk.neighbor_density(*operands, backend=way.backend)
    assert np.abs(density.cpu().numpy() - data["density"]).max() <= 3e-7
