"""Random bits against a pure Python Philox, counts, transposes, and pairs from index lists."""

from __future__ import annotations

import pytest
import torch

from hpkernels.common.bits import pack, unpack, words
from hpkernels.ops.pair_bits import reference
from hpkernels.ops.pair_bits import triton as kernels

MASK = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k, y & MASK, (x >> 32) ^ d ^ m, x & MASK
        k, m = (k + 0x9E3779B9) & MASK, (m + 0xBB67AE85) & MASK
    return a, b, c, d


def test_philox_known_answer():
    expected = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # of the authors' test vectors
    assert philox4x32_10((0, 0, 0, 0), (0, 0)) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789012345678])
@pytest.mark.parametrize("rate", [0.02, 0.5, 0.75, 2.0**-32, 1 - 2.0**-32])
def test_random_bits(seed, rate):
    rows, columns = 3, 200
    bits = kernels.random_bits(torch.tensor(seed), rows, columns, rate)
    assert bits.dtype == torch.int32 and bits.shape == (rows, words(columns))
    q = round(rate * 2**32)
    key = (seed & MASK, (seed >> 32) & MASK)
    for row in range(rows):
        for word in range(words(columns)):
            planes = [p for group in range(8) for p in philox4x32_10((word, row, group, 0), key)]
            acc = 0
            for p in range(32):
                acc = acc | planes[p] if q >> p & 1 else acc & planes[p]
            acc &= (1 << max(0, min(32, columns - 32 * word))) - 1
            assert bits[row, word].item() & MASK == acc


@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 31), (2, 129), (3, 20000), (0, 10)])
def test_rates_zero_and_one(rows, columns):
    ones = kernels.random_bits(torch.tensor(5), rows, columns, 1.0)
    assert unpack(ones, columns).all() and torch.equal(pack(unpack(ones, columns)), ones)
    assert not kernels.random_bits(torch.tensor(5), rows, columns, 0.0).any()


def test_frequency():
    bits = kernels.random_bits(torch.tensor(11), 4, 25000, 0.02)
    share = kernels.count_bits(bits).sum().item() / 1e5
    assert abs(share - 0.02) < 5 * (0.02 * 0.98 / 1e5) ** 0.5


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 63), (65, 129), (129, 65), (196, 784), (300, 33)])
def test_count_and_transpose(rows, columns):
    dense = torch.rand(rows, columns) < 0.3
    bits = pack(dense)
    assert torch.equal(kernels.count_bits(bits), dense.sum(1).int())
    assert torch.equal(kernels.transpose_bits(bits, columns), pack(dense.T.contiguous()))


@pytest.mark.parametrize("rows, k, columns", [(1, 1, 1), (63, 5, 63), (65, 7, 300), (196, 16, 196), (5, 0, 5)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pairs_from_indices(rows, k, columns, symmetric):
    if symmetric and rows != columns:
        pytest.skip("symmetric pairs are square")
    indices = torch.randint(-1, columns, (rows, k))  # with repeats, self pairs and absent ones
    whole = reference.pairs_from_indices(indices, columns, symmetric, 0, rows)
    for first, end in [(0, rows), (0, 0), (rows // 3, rows), (rows - 1, rows), (0, rows // 2)]:
        part = (symmetric, first, end - first)
        assert torch.equal(reference.pairs_from_indices(indices, columns, *part), whole[first:end])
        assert torch.equal(kernels.pairs_from_indices(indices, columns, *part), whole[first:end])
