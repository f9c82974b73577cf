"""Bits on the CPU against big-integer and dense implementations."""

import numpy as np
import pytest
import torch

from hpkernels.ops.pair_bits import cpu as native

SHAPES = [(1, 1), (3, 31), (5, 32), (2, 33), (64, 127), (65, 128), (33, 129), (129, 600), (700, 2049)]


def to_dense(bits, columns):
    octets = bits.numpy().view(np.uint8)
    return torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little")[:, :columns].astype(bool))


def from_dense(dense):
    rows, columns = dense.shape
    padded = np.zeros((rows, (columns + 127) // 128 * 128), dtype=bool)
    padded[:, :columns] = dense.numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def philox(counter, key):
    """Philox4x32-10 in Python integers, written from the paper."""
    low, mask = [0xD2511F53, 0xCD9E8D57], 0xFFFFFFFF
    for round_ in range(10):
        k0, k1 = (key[0] + round_ * 0x9E3779B9) & mask, (key[1] + round_ * 0xBB67AE85) & mask
        p0, p1 = low[0] * counter[0], low[1] * counter[2]
        counter = [(p1 >> 32) ^ counter[1] ^ k0, p1 & mask, (p0 >> 32) ^ counter[3] ^ k1, p0 & mask]
    return counter


def bernoulli(seed, row, column, rate):
    """Bit (row, column): u < q / 2^32 decided digit by digit, lowest first."""
    q = round(rate * 2**32)
    if q in (0, 2**32):
        return bool(q)
    planes = [p for group in range(8) for p in philox([column // 32, row, group, 0], [seed & 0xFFFFFFFF, seed >> 32])]
    bit, first = 0, (q & -q).bit_length() - 1
    for plane in range(first, 32):
        drawn = planes[plane] >> (column % 32) & 1
        bit = bit | drawn if q >> plane & 1 else bit & drawn
    return bool(bit)


def test_philox_known_answers():
    """The counter and key words of the generator's published test vectors."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("rate", [0.0, 2**-32, 0.02, 0.25, 1 / 3, 0.5, 1 - 2**-32, 1.0])
def test_random_bits_are_the_specified_ones(isa, rate):
    seed = 0x9ABCDEF012345678
    rows, columns = 3, 2085
    bits = native.random_bits(torch.tensor(seed - 2**64), rows, columns, rate)
    assert bits.shape == (rows, 68)
    dense = to_dense(bits, columns)
    for i, j in [(r, c) for r in range(rows) for c in (0, 1, 31, 32, 63, 64, 1000, 2047, 2048, 2084)]:
        assert dense[i, j] == bernoulli(seed, i, j, rate)
    assert torch.equal(bits, from_dense(dense))  # padding is zero


def test_random_bits_frequency_and_repeatability():
    rows, columns, rate = 784, 6272, 0.02
    bits = native.random_bits(torch.tensor(5), rows, columns, rate)
    count = native.count_bits(bits).sum().item()
    n = rows * columns
    assert abs(count - n * rate) < 5 * (n * rate * (1 - rate)) ** 0.5
    threads = torch.get_num_threads()
    for other in (1, 2, 3):
        torch.set_num_threads(other)
        assert torch.equal(bits, native.random_bits(torch.tensor(5), rows, columns, rate))
    torch.set_num_threads(threads)
    assert not torch.equal(bits, native.random_bits(torch.tensor(6), rows, columns, rate))
    assert torch.equal(bits[:, :8], native.random_bits(torch.tensor(5), rows, 256, rate))


@pytest.mark.parametrize("shape", SHAPES)
def test_count_and_transpose(isa, shape):
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(shape[1])) < 0.3
    bits = from_dense(dense)
    assert torch.equal(native.count_bits(bits), dense.sum(1, dtype=torch.int32))
    assert torch.equal(native.transpose_bits(bits, shape[1]), from_dense(dense.T.contiguous()))


@pytest.mark.parametrize("rows, columns, symmetric", [(1, 1, True), (65, 65, True), (7, 200, False), (7, 7, False)])
def test_pairs_from_indices(rows, columns, symmetric):
    indices = torch.randint(-1, columns, (rows, 5), generator=torch.Generator().manual_seed(rows))
    dense = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        dense[i, indices[i][indices[i] >= 0]] = True
    if symmetric:
        dense = (dense | dense.T) & ~torch.eye(rows, dtype=torch.bool)
    for first, end in [(0, rows), (0, 0), (rows // 3, rows), (rows - 1, rows), (0, rows // 2)]:
        bits = native.pairs_from_indices(indices, columns, symmetric, first, end - first)
        assert torch.equal(bits, from_dense(dense[first:end]))


def test_empty():
    assert native.random_bits(torch.tensor(0), 0, 5, 0.5).shape == (0, 4)
    assert native.count_bits(torch.zeros(0, 4, dtype=torch.int32)).shape == (0,)
    assert native.transpose_bits(torch.zeros(0, 4, dtype=torch.int32), 5).shape == (5, 0)
    assert not native.pairs_from_indices(torch.zeros(3, 0, dtype=torch.int64), 3, True, 0, 3).any()
