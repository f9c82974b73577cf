"""Search: values and decisions against fp64, for any numbers, lengths, layouts, groups, threads and order of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import hpkernels as hk
from hpkernels import density
from tests.properties.cases import Matrix, matrices, same_bits, seeds, strided, tries, unit, with_threads, working


def bands(queries: Tensor, keys: Tensor) -> Tensor:
    """4 eps sqrt(C) |q| |k| of each pair: decisions beyond it are right (fp64: the same products in another order)."""
    eps = torch.finfo(working(queries, keys)).eps
    lengths = queries.double().norm(dim=1)[:, None] * keys.double().norm(dim=1)[None]
    return 4 * eps * queries.shape[1] ** 0.5 * lengths + torch.finfo(torch.float32).tiny


def products(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.double() @ keys.double().T


@tries(
    lambda on: dict(
        q=matrices(st.integers(0, on.most(240)), on.dtypes), count=st.integers(1, on.most(240)),
        dtype=st.sampled_from(("own", "float32")), seed=seeds(), backend=on.backend,
    ),
)  # fmt: skip
def test_max_similarity_is_the_largest_product(q: Matrix, count, dtype, seed, backend):
    queries, keys = q.tensor(), q.like(count, seed)
    keys = keys if dtype == "own" else keys.float()
    found = hk.max_similarity(queries, keys, backend=backend)
    assert found.dtype == working(queries, keys) and found.shape == (q.rows,)
    assert ((found - products(queries, keys).amax(1)).abs() <= bands(queries, keys).amax(1)).all()


@tries(
    lambda on: dict(
        q=matrices(st.integers(0, on.most(240)), on.dtypes), count=st.integers(1, on.most(240)),
        share=st.sampled_from((0.0, 0.1, 1.0)), groups=st.sampled_from((0, 1, 3)), seed=seeds(), backend=on.backend,
    ),
)  # fmt: skip
def test_topk_finds_the_largest(q: Matrix, count, share, groups, seed, backend):
    queries, keys = q.tensor(), q.like(count, seed)
    k = max(1, round(share * count))
    own, theirs = torch.arange(q.rows) % max(1, groups), torch.arange(count) // 2 % max(1, groups)
    given = dict(query_groups=strided(own), key_groups=strided(theirs)) if groups else {}
    values, indices = hk.topk_similarity(queries, keys, k, backend=backend, **given)
    assert values.dtype == torch.float32 and values.shape == indices.shape == (q.rows, k)
    check_topk(queries, keys, own[:, None] == theirs[None], values, indices)


@tries(lambda on: dict(q=matrices(st.integers(2, on.most(240)), on.dtypes), k=st.integers(1, 9), backend=on.backend))
def test_topk_without_self(q: Matrix, k, backend):
    x, k = q.tensor(), min(k, q.rows - 1)
    values, indices = hk.topk_similarity(x, x, k, exclude_self=True, backend=backend)
    check_topk(x, x, ~torch.eye(q.rows, dtype=torch.bool), values, indices)


def check_topk(queries: Tensor, keys: Tensor, allowed: Tensor, values: Tensor, indices: Tensor) -> None:
    """The k largest of the allowed pairs, in order, each once, missing places -inf and -1, ties to the lower index."""
    k = values.shape[1]
    number = allowed.sum(1, keepdim=True).clamp_max(k)
    found = torch.arange(k) < number
    assert ((indices >= 0) == found).all() and ((values == -torch.inf) == ~found).all()
    if not queries.numel():
        return
    s, near = products(queries, keys), bands(queries, keys) + 1.2e-7 * products(queries, keys).abs()
    place = indices.clamp_min(0)
    assert (allowed.gather(1, place) | ~found).all()
    assert all(len(set(row[row >= 0].tolist())) == n for row, n in zip(indices, number[:, 0].tolist()))
    off = (values - s.gather(1, place)).abs()
    assert (off[found] <= near.gather(1, place)[found]).all()
    worst = torch.where(found, values, torch.inf).amin(1, keepdim=True).double()
    left_out = allowed.scatter(1, place, False) if bool(found.all()) else allowed.clone()
    if not bool(found.all()):
        for r, row in enumerate(indices):
            left_out[r, row[row >= 0]] = False
    assert not (left_out & (s > worst + 2 * near)).any()
    falls = values[:, 1:] < values[:, :-1]
    ties = values[:, 1:] == values[:, :-1]
    if torch.float64 not in (queries.dtype, keys.dtype):  # else fp64 products decide, which may be one number in fp32
        ties &= indices[:, 1:] > indices[:, :-1]
    assert (falls | ties | ~found[:, 1:]).all()


@tries(
    lambda on: dict(
        q=matrices(st.integers(0, on.most(240)), on.dtypes, kinds=("integers", "one-hot"), max_spread=0),
        count=st.integers(1, on.most(240)), seed=seeds(), backend=on.backend,
    ),
    always=True,
)  # fmt: skip
def test_exact_products_are_decided_exactly(q: Matrix, count, seed, backend):
    """Small integers: no rounding anywhere, so ties are ties and every backend gives the one right answer."""
    q = Matrix(q.rows, q.width, q.kind, 0, q.dtype, q.layout, q.seed)
    queries, keys = q.tensor(), q.like(count, seed)
    s, k = products(queries, keys), min(count, 7)
    values, indices = hk.topk_similarity(queries, keys, k, backend=backend)
    expected, order = s.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values.double(), expected[:, :k]) and torch.equal(indices, order[:, :k])
    assert torch.equal(hk.max_similarity(queries, keys, backend=backend).double(), expected[:, 0])
    limits = s.median(1).values.to(working(queries))
    above = hk.pairs_above(queries, limits, keys=keys, backend=backend).to_dense()
    assert torch.equal(above, s > limits[:, None])


@tries(
    lambda on: dict(
        q=matrices(st.integers(0, on.most(240)), on.dtypes), count=st.integers(1, on.most(240)),
        form=st.sampled_from(("itself", "keys", "both")), seed=seeds(), backend=on.backend,
    ),
)  # fmt: skip
def test_pairs_above_their_thresholds(q: Matrix, count, form, seed, backend):
    x = q.tensor()
    keys = x if form == "itself" else q.like(count, seed)
    s, near = products(x, keys), bands(x, keys)
    generator = torch.Generator().manual_seed(seed)
    limits = torch.where(torch.rand(q.rows, generator=generator) < 0.5, s.mean(1), s.amax(1) if q.rows else s.mean(1))
    limits = limits.to(working(x, keys))
    theirs = limits if form == "itself" else None
    if form == "both":
        theirs = (s.mean(0) if q.rows else torch.zeros(count)).to(working(x, keys))
    given = {} if form == "itself" else dict(keys=keys, key_thresholds=theirs)
    mask = hk.pairs_above(x, strided(limits), backend=backend, **given)
    found, limit = mask.to_dense(), limits.double()[:, None].expand_as(s)
    if theirs is not None:
        limit = torch.minimum(limit, theirs.double()[None])
    expected, sure = s > limit, (s - limit).abs() > near
    if form == "itself":
        expected.fill_diagonal_(False)
        sure.fill_diagonal_(True)
        assert mask.symmetric and torch.equal(found, found.T)
    assert not (found != expected)[sure].any()
    assert torch.equal(mask.sum(1), found.sum(1).int())


@tries(
    lambda on: dict(
        q=matrices(st.integers(1, on.most(240)), on.dtypes), count=st.integers(1, on.most(240)), seed=seeds(),
        threads=on.threads, power=st.integers(-2, 2), native=on.native,
    ),
)  # fmt: skip
def test_order_lengths_threads_and_earlier_calls_do_not_show(q: Matrix, count, seed, threads, power, native):
    queries, keys = q.tensor(), q.like(count, seed)
    k, generator = min(count, 5), torch.Generator().manual_seed(seed)
    of_queries, of_keys = torch.randperm(q.rows, generator=generator), torch.randperm(count, generator=generator)

    def searches(queries: Tensor, keys: Tensor):
        top = hk.max_similarity(queries, keys, backend=native)
        pairs = hk.pairs_above(queries, top, backend=native).bits
        return top, *hk.topk_similarity(queries, keys, k, backend=native), pairs

    first = searches(queries, keys)
    hk.max_similarity(torch.randn(70, 33), torch.randn(65, 33), backend=native)
    assert same_bits(with_threads(threads, lambda: searches(queries, keys)), first)
    assert same_bits(searches(queries.contiguous(), keys.contiguous()), first)
    top, values, _, _ = searches(queries[of_queries], keys[of_keys])
    assert torch.equal(top, first[0][of_queries]) and torch.equal(values, first[1][of_queries])
    factor = 2.0**power
    # Powers of two change no digit, in fp16 those of small numbers.
    top, *others = searches(queries * factor, keys * factor)
    if q.dtype != torch.float16:
        assert torch.equal(top, first[0] * factor**2) and same_bits(others[1:], first[2:])


@tries(
    lambda on: dict(
        q=matrices(st.integers(2, on.most(150)), on.dtypes), pool=st.none() | st.integers(1, 30), k=st.integers(1, 6),
        power=st.integers(-2, 2), threads=on.threads, seed=seeds(), backend=on.backend,
    ),
)  # fmt: skip
def test_hidden_positives_are_closer_than_the_pool(q: Matrix, pool, k, power, threads, seed, backend):
    """By the pool or by the k nearest; the order of rows and of the pool, lengths and threads do not show."""
    x, k = q.tensor(), min(k, q.rows - 1)
    rule = dict(positives_per_anchor=k) if pool is None else dict(pool=q.like(pool, seed))
    found = hk.hidden_positives(x, backend=backend, **rule)
    pairs, s = found.to_dense(), unit(x) @ unit(x).T
    assert found.symmetric and torch.equal(pairs, pairs.T) and not pairs.diagonal().any()
    s.fill_diagonal_(-torch.inf)
    floor = s.topk(k).values[:, -1] if pool is None else (unit(x) @ unit(rule["pool"]).T).amax(1)
    limit, near = torch.minimum(floor[:, None], floor[None]), 8 * torch.finfo(working(x)).eps * q.width**0.5
    assert not (pairs & (s < limit - near)).any() and not (~pairs & (s > limit + near)).any()
    if backend == "reference":  # whose products round by place and number of rows
        return
    order = torch.randperm(q.rows, generator=torch.Generator().manual_seed(seed))
    if pool is not None:
        moved = hk.hidden_positives(x[order], rule["pool"].flip(0), backend=backend).to_dense()
        assert torch.equal(moved, pairs[order][:, order])
    if q.dtype != torch.float16:
        assert torch.equal(hk.hidden_positives(x * 2.0**power, backend=backend, **rule).bits, found.bits)
    again = with_threads(threads, lambda: hk.hidden_positives(x.contiguous(), backend=backend, **rule))
    assert torch.equal(again.bits, found.bits)


@tries(
    lambda on: dict(
        q=matrices(st.integers(0, on.most(240)), on.dtypes), count=st.integers(0, on.most(160)),
        scales=st.sampled_from(((1,), (8, 16, 32), (3, 100))), groups=st.sampled_from((0, 3)), seed=seeds(),
        backend=on.backend,
    ),
)  # fmt: skip
def test_neighbor_density_is_the_mean_of_the_nearest(q: Matrix, count, scales, groups, seed, backend):
    features, memory = q.tensor(), q.like(count, seed)
    own, theirs = torch.arange(q.rows) % max(1, groups), torch.arange(count) // 2 % max(1, groups + 1)
    given = dict(query_groups=strided(own), memory_groups=strided(theirs)) if groups else {}
    found = hk.neighbor_density(features, memory, scales=scales, backend=backend, **given)
    assert found.dtype == torch.float32
    cosines = unit(features) @ unit(memory).T
    for i in range(q.rows):
        row = cosines[i][theirs == own[i]] if groups else cosines[i]
        row = row.sort(descending=True).values
        expected = sum(row[:k].mean().item() if len(row) else 0.0 for k in scales) / len(scales)
        assert abs(found[i].item() - expected) <= 8 * 1.2e-7 * q.width**0.5
    if backend != "reference":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(density, "_CPU_ROWS", 7)
            parts = hk.neighbor_density(features, memory, scales=scales, backend=backend, **given)
        assert torch.equal(parts, found)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if groups:
        given["memory_groups"] = theirs[order]
    moved = hk.neighbor_density(2.0**3 * features, memory[order], scales=scales, backend=backend, **given)
    assert torch.equal(moved, found) if backend != "reference" else torch.allclose(moved, found, rtol=0, atol=1e-5)
