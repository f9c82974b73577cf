"""What is Triton's searches' own: both routes of the k largest, the tiles of pairs and the order of the triangle's."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from hpkernels import tuning
from hpkernels.ops.common.triton import triangle_programs, triangle_tile
from hpkernels.ops.similarity_search.triton import pairs, rows
from tests.ops.similarity_search.searches import limits, same, topk, unpack, whole

OP = "similarity_search"


@pytest.mark.parametrize("k", [1, 7, 12])
@pytest.mark.parametrize("unfused", [False, True])
def test_topk_ties_go_to_the_lower_index(kernels, k, unfused, processors, monkeypatch):
    processors(8)
    monkeypatch.setattr(rows, "_KEY_BYTES", 8 * 300 * 64)  # several row blocks
    queries, keys = torch.randint(-1, 2, (70, 4)).float(), torch.randint(-1, 2, (300, 4)).float()
    with tuning.forced("topk_similarity", {"longest_list": 0 if unfused else 256}):
        found = kernels.topk_similarity(queries, keys, k, False, None, None)
    assert same(found, topk(queries @ keys.T, k))


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("unfused", [False, True])
def test_topk_groups_may_be_smaller_than_k(kernels, k, unfused):
    queries, keys = torch.randint(-2, 3, (70, 5)).float(), torch.randint(-2, 3, (90, 5)).float()
    groups = torch.randint(0, 12, (70,)), torch.randint(1, 13, (90,))
    with tuning.forced("topk_similarity", {"longest_list": 0 if unfused else 256}):
        found = kernels.topk_similarity(queries, keys, k, k == 5, *groups)
    assert same(found, topk(queries @ keys.T, k, k == 5, *groups))


@pytest.mark.parametrize("keys", [100, 128, 300])
@pytest.mark.parametrize("descriptors", [False, True])
def test_max_in_any_tiles(kernels, processors, dtype, keys, descriptors):
    """Of negative products: what stands for missing keys may not be 0. Some splits are of one tile, some of two."""
    processors(3)
    queries, keys = whole(70, 20, dtype), whole(keys, 20, dtype)
    queries[:, 0], keys[:, 0] = 10, -50
    tile = dict(BLOCK_M=32, BLOCK_N=128, BLOCK_K=16, descriptors=descriptors)
    with tuning.forced("max_similarity", tile):
        found = kernels.max_similarity(queries, keys)
    assert torch.equal(found.double(), (queries.double() @ keys.double().T).amax(1))


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("persistent", [0, 1])
@pytest.mark.parametrize("block_m, block_n", [(32, 128), (128, 128), (128, 256)])
def test_pairs_in_any_tiles(kernels, monkeypatch, processors, dtype, block_m, block_n, persistent, subtracts):
    """Squares of four, one and two tiles; one or many a program; signs by comparing, or as NVIDIA's by subtracting."""
    processors(3)
    monkeypatch.setattr(pairs.target_info, "is_cuda", lambda: subtracts)
    x, keys = whole(300, 20, dtype), whole(290, 20, dtype)
    thresholds, key_thresholds = torch.randint(-3, 9, (300,)).float(), torch.randint(-3, 9, (290,)).float()
    thresholds[:5] = torch.tensor([torch.nan, -0.0, 0.0, torch.inf, -torch.inf])
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=16, persistent=persistent)
    with tuning.forced("pairs_above", tile):
        found = [kernels.pairs_above(x, thresholds, *keyed) for keyed in ((None, None), (keys, key_thresholds))]
    s = x.double() @ x.double().T
    assert torch.equal(unpack(found[0], 300), (s > limits(s, thresholds, thresholds)).fill_diagonal_(False))
    s = x.double() @ keys.double().T
    assert torch.equal(unpack(found[1], 290), s > limits(s, thresholds, key_thresholds))


@triton.jit
def _decode_kernel(r_ptr, c_ptr, programs, tiles, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r, c = triangle_tile(tl.minimum(p, programs - 1), GROUP, tiles)
    tl.store(r_ptr + p, r)
    tl.store(c_ptr + p, c)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "tiles, group",
    [(1, 8), (7, 8), (8, 8), (40, 8), (393, 8), (50, 4), pytest.param(1563, 8, marks=pytest.mark.slow)],
)
def test_triangle_schedule_visits_every_upper_tile_once(tiles, group, exact):
    programs = tiles * (tiles + 1) // 2 if exact else triangle_programs(tiles, group)
    block = 1 << 16
    padded = triton.cdiv(programs, block) * block
    r, c = torch.empty(2, padded, dtype=torch.int32)
    _decode_kernel[(padded // block,)](r, c, programs, tiles if exact else None, GROUP=group, BLOCK=block)
    r, c = r[:programs].long(), c[:programs].long()
    assert (r >= 0).all() and (r <= c).all()
    inside = c < tiles
    seen = (r * tiles + c)[inside].sort().values
    rows, columns = torch.triu_indices(tiles, tiles)
    assert torch.equal(seen, (rows * tiles + columns).sort().values)
