"""PairMask: an algebra of bits that equals that of bools, and random bits that depend on seed, row and column alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

import hpkernels as hk
from hpkernels.common import bits as _bits
from tests.properties.cases import seeds, tries, with_threads

sizes = st.integers(0, 300)


@tries(lambda on: dict(rows=sizes, columns=sizes, density=st.sampled_from((0.0, 0.02, 0.5, 1.0)), seed=seeds()))
def test_bits_are_bools(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, rows, columns, generator=generator) < density
    x, y = hk.PairMask.from_dense(a), hk.PairMask.from_dense(b.T.contiguous().T)
    for mask, dense in ((x, a), (y, b), (x & y, a & b), (x | y, a | b), (~x, ~a), (x.T, a.T), (~(~x), a)):
        assert torch.equal(mask.to_dense(), dense) and mask.shape == tuple(dense.shape)
        assert torch.equal(mask.sum(1), dense.sum(1).int()) and torch.equal(mask.sum(0), dense.sum(0).int())
        assert mask.sum() == dense.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bits, "_CHUNK_PAIRS", 1000)
        assert torch.equal(hk.PairMask.from_dense(a).bits, x.bits)
    every_second = hk.PairMask(torch.stack([x.bits, ~x.bits], 1).flatten(0, 1)[::2], columns)
    assert torch.equal(every_second.to_dense(), a) and torch.equal(every_second.sum(1), x.sum(1))
    assert torch.equal(every_second.T.bits, x.T.bits)
    if rows == columns:
        assert torch.equal(x.off_diagonal().to_dense(), a & ~torch.eye(rows, dtype=torch.bool))


@tries(
    lambda on: dict(
        rate=st.sampled_from((0.0, 1e-9, 0.02, 0.5, 0.999, 1.0)) | st.floats(0, 1), rows=sizes, columns=sizes,
        seed=st.integers(-(2**63), 2**63 - 1), threads=st.integers(1, 4), native=on.native,
    ),
    always=True,
)  # fmt: skip
def test_random_bits_depend_on_seed_row_and_column_alone(rate, rows, columns, seed, threads, native):
    first, second = (hk.PairMask.random(rate, (rows, columns), seed, backend=b).bits for b in ("reference", native))
    assert torch.equal(first, second)
    mask = with_threads(threads, lambda: hk.PairMask.random(rate, (rows + 3, columns + 140), torch.tensor(seed)))
    assert torch.equal(mask.to_dense()[:rows, :columns], hk.PairMask(first, columns).to_dense())
    share, count = float(hk.PairMask(first, columns).sum()), rows * columns
    assert abs(share - rate * count) <= 7 * (rate * (1 - rate) * count) ** 0.5 + 1


@tries(lambda on: dict(labels=st.lists(st.integers(-2, 3), max_size=200)))
def test_pairs_of_labels(labels):
    labels = torch.tensor(labels, dtype=torch.int64)
    expected = (labels[:, None] == labels) & (labels >= 0)[:, None] | (labels[:, None] == -2) & (labels == -2)
    expected.fill_diagonal_(False)
    assert torch.equal(hk.PairMask.from_labels(labels).to_dense(), expected)
