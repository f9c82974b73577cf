"""max_similarity, topk_similarity and pairs_above against fp64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from hpkernels import tuning
from hpkernels.common.bits import pack, unpack
from hpkernels.ops.common.triton import triangle_programs, triangle_tile
from hpkernels.ops.similarity_search import reference
from hpkernels.ops.similarity_search import triton as kernels


def band(d: int) -> float:
    """Decisions may differ within 4 eps sqrt(D) of the threshold."""
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(d)


def test_max_similarity(n, d, dtype, units):
    queries, keys = units(n, d, dtype=dtype), units(max(1, n // 2 + 1), d, dtype=dtype)
    expected = (queries.double() @ keys.double().T).amax(1).float()
    torch.testing.assert_close(kernels.max_similarity(queries, keys), expected, atol=band(d), rtol=0)


def test_max_similarity_of_mixed_dtypes_and_of_splits_is_exact_in_each(units, splits):
    queries, keys = units(65, 48, dtype=torch.float16), units(700, 48)
    expected = (queries.double() @ keys.double().T).amax(1).float()
    torch.testing.assert_close(kernels.max_similarity(queries, keys), expected, atol=band(48), rtol=0)


def test_max_similarity_keeps_nan(units):
    queries, keys = units(5, 16), units(9, 16)
    queries[2, 3] = torch.nan
    assert kernels.max_similarity(queries, keys).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("k", [1, 6, 40])
def test_topk_similarity(n, d, k, dtype, units):
    if k == 40 and n > 129:
        pytest.skip("minutes under the interpreter, which pays for each entry of a list")
    queries, keys = units(n, d, dtype=dtype), units(n + 3, d, dtype=dtype)
    k = min(k, n + 2)
    values, indices = kernels.topk_similarity(queries, keys, k, True, None, None)
    expected, _ = reference.topk_similarity(queries.double(), keys.double(), k, True, None, None)
    torch.testing.assert_close(values, expected, atol=band(d), rtol=0)
    chosen = (queries.double() @ keys.double().T).gather(1, indices)
    torch.testing.assert_close(chosen.float(), expected, atol=band(d), rtol=0)
    assert (indices != torch.arange(n)[:, None]).all()
    assert (indices.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("k", [1, 7, 12])
@pytest.mark.parametrize("unfused", [False, True])
def test_topk_ties_go_to_the_lower_index(k, unfused, splits, monkeypatch):
    monkeypatch.setattr(kernels, "_KEY_BYTES", 8 * 300 * 64)  # several row blocks
    queries = torch.randint(-1, 2, (70, 4)).float()
    keys = torch.randint(-1, 2, (300, 4)).float()
    with tuning.forced("topk_similarity", {"longest_list": 0 if unfused else 256}):
        values, indices = kernels.topk_similarity(queries, keys, k, False, None, None)
    expected, places = reference.topk_similarity(queries, keys, k, False, None, None)
    assert torch.equal(values, expected) and torch.equal(indices, places)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("unfused", [False, True])
def test_topk_groups_may_be_smaller_than_k(k, unfused):
    exclude_self = k == 5
    queries, keys = torch.randint(-2, 3, (70, 5)).float(), torch.randint(-2, 3, (90, 5)).float()
    groups = torch.randint(0, 12, (70,)), torch.randint(1, 13, (90,))
    with tuning.forced("topk_similarity", {"longest_list": 0 if unfused else 256}):
        values, indices = kernels.topk_similarity(queries, keys, k, exclude_self, *groups)
    expected, places = reference.topk_similarity(queries, keys, k, exclude_self, *groups)
    assert torch.equal(values, expected) and torch.equal(indices, places)


def _agree(bits, s, theta, columns):
    chosen = unpack(bits, columns)
    clear = (s - theta).abs() > band(520)
    assert torch.equal(chosen[clear], (s > theta)[clear])
    assert clear.double().mean() > 0.9 or s.numel() < 10
    assert torch.equal(pack(chosen), bits), "padding bits must be zero"
    return chosen


def test_pairs_above_symmetric(n, d, dtype, units):
    x = units(n, d, dtype=dtype)
    thresholds = 0.1 * torch.randn(n)
    s = x.double() @ x.double().T
    theta = torch.minimum(thresholds[:, None], thresholds).double()
    theta.fill_diagonal_(torch.inf)
    chosen = _agree(kernels.pairs_above(x, thresholds, None, None), s, theta, n)
    assert torch.equal(chosen, chosen.T)


@pytest.mark.parametrize("key_thresholds", [False, True])
def test_pairs_above_keys(n, d, key_thresholds, dtype, units):
    x, keys = units(n, d, dtype=dtype), units(n // 2 + 70, d, dtype=torch.float16)
    thresholds, theirs = 0.1 * torch.randn(n), 0.1 * torch.randn(len(keys))
    theta = thresholds[:, None].double().expand(n, len(keys))
    if key_thresholds:
        theta = torch.minimum(theta, theirs.double())
    bits = kernels.pairs_above(x, thresholds, keys, theirs if key_thresholds else None)
    _agree(bits, x.double() @ keys.double().T, theta, len(keys))


def test_nan_thresholds_and_products_compare_false(units):
    x, thresholds = units(40, 16), torch.full((40,), -2.0)
    thresholds[3], x[5, 0] = torch.nan, torch.nan
    chosen = unpack(kernels.pairs_above(x, thresholds, None, None), 40)
    expected = ~torch.eye(40, dtype=torch.bool)
    for bad in (3, 5):
        expected[bad], expected[:, bad] = False, False
    assert torch.equal(chosen, expected)


@triton.jit
def _decode_kernel(r_ptr, c_ptr, first, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    p = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r, c = triangle_tile(p, GROUP)
    tl.store(r_ptr + p - first, r)
    tl.store(c_ptr + p - first, c)


@pytest.mark.parametrize(
    "tiles, group",
    [(1, 8), (7, 8), (8, 8), (40, 8), (393, 8), (50, 4), pytest.param(1563, 8, marks=pytest.mark.slow)],
)
def test_triangle_schedule_visits_every_upper_tile_once(tiles, group):
    programs = triangle_programs(tiles, group)
    block = 1 << 16
    padded = triton.cdiv(programs, block) * block
    r, c = torch.empty(2, padded, dtype=torch.int32)
    _decode_kernel[(padded // block,)](r, c, 0, GROUP=group, BLOCK=block)
    r, c = r[:programs].long(), c[:programs].long()
    assert (r >= 0).all() and (r <= c).all()
    inside = c < tiles
    seen = (r * tiles + c)[inside].sort().values
    rows, columns = torch.triu_indices(tiles, tiles)
    assert torch.equal(seen, (rows * tiles + columns).sort().values)
