"""Packed pairs, bit for bit: random bits against a Philox in Python's integers, the rest against dense matrices."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

OP = "pair_bits"
MASK = 0xFFFFFFFF
RATES = [0.0, 2.0**-32, 0.02, 0.25, 1 / 3, 0.5, 0.75, 1 - 2.0**-32, 1.0]


def to_dense(bits, columns):
    octets = bits.numpy().view(np.uint8)
    return torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little")[:, :columns].astype(bool))


def from_dense(dense):
    rows, columns = dense.shape
    padded = np.zeros((rows, (columns + 127) // 128 * 128), dtype=bool)
    padded[:, :columns] = dense.numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def philox(counter, key):
    """Philox4x32-10: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k, y & MASK, (x >> 32) ^ d ^ m, x & MASK
        k, m = (k + 0x9E3779B9) & MASK, (m + 0xBB67AE85) & MASK
    return a, b, c, d


@functools.cache
def random_word(seed, rate, row, word):
    """32 bits u < q / 2^32, decided digit by digit, lowest first."""
    q = round(rate * 2**32)
    if q in (0, 2**32):
        return MASK if q else 0
    key = (seed & MASK, (seed >> 32) & MASK)
    planes = [plane for group in range(8) for plane in philox((word, row, group, 0), key)]
    bits = 0
    for digit, plane in enumerate(planes):
        bits = bits | plane if q >> digit & 1 else bits & plane
    return bits


def test_philox_known_answers():
    """The counter and key words of the generator's published test vectors."""
    assert philox([0] * 4, [0] * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox([MASK] * 4, [MASK] * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789012345678, 0x9ABCDEF012345678 - 2**64])
@pytest.mark.parametrize("rate", RATES)
def test_random_bits_are_the_specified_ones(kernels, seed, rate):
    rows, columns = 3, 333
    bits = kernels.random_bits(torch.tensor(seed), rows, columns, rate)
    assert bits.dtype == torch.int32 and bits.shape == (rows, 12)
    for row in range(rows):
        for word in range(12):
            inside = (1 << max(0, min(32, columns - 32 * word))) - 1  # padding is zero
            assert bits[row, word].item() & MASK == random_word(seed, rate, row, word) & inside


@pytest.mark.parametrize("rate", RATES)
def test_random_bits_of_long_rows(kernels, rate):
    seed, rows, columns = 0x9ABCDEF012345678 - 2**64, 3, 2085
    bits = kernels.random_bits(torch.tensor(seed), rows, columns, rate)
    assert bits.shape == (rows, 68)
    dense = to_dense(bits, columns)
    for i, j in [(r, c) for r in range(rows) for c in (0, 1, 31, 32, 63, 64, 1000, 2047, 2048, 2084)]:
        assert dense[i, j] == bool(random_word(seed, rate, i, j // 32) >> j % 32 & 1)
    assert torch.equal(bits, from_dense(dense))  # padding is zero


@pytest.mark.only("reference", "cpu", "cuda")
def test_random_bits_of_many_rows(kernels):
    """More than one block of a GPU."""
    bits = kernels.random_bits(torch.tensor(7), 300, 40, 0.3)
    for row in (0, 1, 127, 128, 255, 256, 299):
        found = [word & MASK for word in bits[row].tolist()]
        assert found == [random_word(7, 0.3, row, 0), random_word(7, 0.3, row, 1) & 0xFF, 0, 0]


@pytest.mark.cases("rows, columns", [(1, 1), (4, 31), (2, 129), (3, 20000), (0, 10)])
def test_rates_zero_and_one(kernels, rows, columns):
    ones = kernels.random_bits(torch.tensor(5), rows, columns, 1.0)
    assert torch.equal(ones, from_dense(torch.ones(rows, columns, dtype=torch.bool)))
    assert not kernels.random_bits(torch.tensor(5), rows, columns, 0.0).any()


@pytest.mark.cases("rows, columns", [(4, 25000)], cpu=[(784, 6272)])
def test_frequency(kernels, rows, columns):
    rate, n = 0.02, rows * columns
    bits = kernels.random_bits(torch.tensor(5), rows, columns, rate)
    count = kernels.count_bits(bits).sum().item()
    assert abs(count - n * rate) < 5 * (n * rate * (1 - rate)) ** 0.5
    assert torch.equal(bits, kernels.random_bits(torch.tensor(5), rows, columns, rate))
    assert not torch.equal(bits, kernels.random_bits(torch.tensor(6), rows, columns, rate))
    assert torch.equal(bits[:, :8], kernels.random_bits(torch.tensor(5), rows, 256, rate))


@pytest.mark.only("cpu")
def test_thread_counts_agree_bitwise(kernels, same_for_all_threads):
    same_for_all_threads(lambda: (kernels.random_bits(torch.tensor(5), 784, 6272, 0.02),))


@pytest.mark.cases(
    "rows, columns",
    [(1, 1), (3, 31), (5, 32), (2, 33), (2, 63), (64, 127), (65, 128), (33, 129), (65, 129), (129, 65), (129, 600),
     (300, 33), (5, 1000)],
    cpu=[(700, 2049)], triton=[(196, 784)],
)  # fmt: skip
def test_count_and_transpose(kernels, rows, columns):
    dense = torch.rand(rows, columns) < 0.3
    bits = from_dense(dense)
    assert torch.equal(kernels.count_bits(bits)[0], dense.sum(1, dtype=torch.int32))
    assert torch.equal(kernels.transpose_bits(bits, columns), from_dense(dense.T.contiguous()))


def check_pairs(kernels, rows, k, columns, symmetric):
    """Of random indices with repeats, self pairs and absent ones."""
    indices = torch.randint(-1, columns, (rows, k))
    dense = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        dense[i, indices[i][indices[i] >= 0]] = True
    if symmetric:
        dense = (dense | dense.T) & ~torch.eye(rows, dtype=torch.bool)
    half, third = rows // 2, rows // 3
    for first, end in [(0, rows), (0, 0), (third, rows), (rows - 1, rows), (0, half), (half, half + 1), (half, half)]:
        bits = kernels.pairs_from_indices(indices, columns, symmetric, first, end - first)
        assert torch.equal(bits, from_dense(dense[first:end]))


@pytest.mark.cases(
    "rows, k", [(1, 1), (1, 5), (63, 5), (65, 5), (5, 0), (130, 9)], cuda=[(1100, 2)], triton=[(196, 16)]
)
def test_symmetric_pairs(kernels, rows, k):
    check_pairs(kernels, rows, k, rows, True)


@pytest.mark.cases(
    "rows, k, columns",
    [(1, 1, 1), (7, 5, 200), (7, 5, 7), (63, 5, 63), (65, 7, 300), (5, 0, 5), (3, 200, 300)],
    cpu=[(2, 7, 70000)], cuda=[(2, 7, 70000)], triton=[(196, 16, 196)],
)  # fmt: skip
def test_listed_pairs(kernels, rows, k, columns):
    """70,000 columns: more words than a block of the CUDA kernel holds."""
    check_pairs(kernels, rows, k, columns, False)


@pytest.mark.only("cuda")
def test_an_index_past_the_columns_is_no_pair(kernels):
    """Unlike on the CPU nothing can raise: it must not write elsewhere either."""
    bits = kernels.pairs_from_indices(torch.tensor([[2, 3, 40], [-7, 127, 128]]), 3, False, 0, 2)
    assert to_dense(bits, 128).nonzero().tolist() == [[0, 2]]


def test_a_view_between_two_chunks(kernels):
    """Four bytes past where a load of 16 bytes may begin."""
    bits = torch.arange(2 * 8 + 1, dtype=torch.int32)[1:].view(2, 8)
    dense = to_dense(bits.clone(), 256)
    assert torch.equal(kernels.count_bits(bits)[0], dense.sum(1, dtype=torch.int32))
    assert torch.equal(kernels.transpose_bits(bits, 256), from_dense(dense.T.contiguous()))


def test_nothing(kernels):
    assert kernels.random_bits(torch.tensor(0), 0, 5, 0.5).shape == (0, 4)
    assert kernels.count_bits(torch.zeros(0, 4, dtype=torch.int32)).shape == (1, 0)
    assert kernels.transpose_bits(torch.zeros(0, 4, dtype=torch.int32), 5).shape == (5, 0)
    assert not kernels.pairs_from_indices(torch.zeros(3, 0, dtype=torch.int64), 3, True, 0, 3).any()
    assert kernels.pairs_from_indices(torch.zeros(0, 2, dtype=torch.int64), 5, False, 0, 0).shape == (0, 4)
