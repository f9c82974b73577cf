"""The CUDA kernels of packed pairs on the host: bit for bit the reference's."""

from __future__ import annotations

import pytest
import torch

from hpkernels.common.bits import pack, unpack
from hpkernels.ops.pair_bits import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(1, 1), (2, 63), (65, 129), (129, 65), (300, 33), (5, 1000)]


@pytest.mark.parametrize("seed", [0, -1, 123456789012345678])
@pytest.mark.parametrize("rate", [0.0, 2.0**-32, 0.02, 0.5, 0.75, 1 - 2.0**-32, 1.0])
def test_random_bits(pair_bits, seed, rate):
    arguments = (torch.tensor(seed), 3, 333, rate)
    assert torch.equal(pair_bits.random_bits(*arguments), reference.random_bits(*arguments))


def test_random_bits_of_many_rows(pair_bits):
    arguments = (torch.tensor(7), 300, 40, 0.3)  # more than one block
    assert torch.equal(pair_bits.random_bits(*arguments), reference.random_bits(*arguments))


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_count_and_transpose(pair_bits, rows, columns):
    dense = torch.rand(rows, columns) < 0.3
    bits = pack(dense)
    assert torch.equal(pair_bits.count_bits(bits), dense.sum(1).int())
    assert torch.equal(pair_bits.transpose_bits(bits, columns), pack(dense.T.contiguous()))


@pytest.mark.parametrize("rows, k", [(1, 1), (63, 5), (130, 9), (1100, 2)])
def test_symmetric_pairs(pair_bits, rows, k):
    indices = torch.randint(-1, rows, (rows, k))  # with repeats, self pairs and absent ones
    whole = reference.pairs_from_indices(indices, rows, True, 0, rows)
    for first, end in ((0, rows), (rows // 3, rows), (rows // 2, rows // 2 + 1), (rows // 2, rows // 2)):
        bits = pair_bits.pairs_from_indices(indices, rows, True, first, end - first)
        assert torch.equal(bits, whole[first:end])
    dense = unpack(whole, rows)
    assert torch.equal(dense, dense.T) and not dense.diagonal().any()


@pytest.mark.parametrize("rows, k, columns", [(3, 200, 300), (2, 7, 70000), (4, 0, 5)])
def test_listed_pairs(pair_bits, rows, k, columns):
    """70,000 columns: more words than one block holds."""
    indices = torch.randint(-1, columns, (rows, k))
    for part in ((0, rows), (1, rows - 1)):
        bits = pair_bits.pairs_from_indices(indices, columns, False, *part)
        assert torch.equal(bits, reference.pairs_from_indices(indices, columns, False, *part))


def test_an_index_past_the_columns_is_no_pair(pair_bits):
    """Unlike on the CPU nothing can raise: it must not write elsewhere either."""
    bits = pair_bits.pairs_from_indices(torch.tensor([[2, 3, 40], [-7, 127, 128]]), 3, False, 0, 2)
    assert unpack(bits, 128).nonzero().tolist() == [[0, 2]]


def test_a_view_between_two_chunks(pair_bits):
    wide = torch.arange(2 * 8 + 1, dtype=torch.int32)
    bits = wide[1:].view(2, 8)
    assert torch.equal(pair_bits.count_bits(bits), reference.count_bits(bits))
    assert torch.equal(pair_bits.transpose_bits(bits, 256), reference.transpose_bits(bits, 256))


def test_nothing(pair_bits):
    assert pair_bits.random_bits(torch.tensor(0), 0, 5, 0.5).shape == (0, 4)
    assert pair_bits.count_bits(torch.zeros(0, 4, dtype=torch.int32)).shape == (0,)
    assert pair_bits.transpose_bits(torch.zeros(0, 4, dtype=torch.int32), 5).shape == (5, 0)
    assert pair_bits.pairs_from_indices(torch.zeros(0, 2, dtype=torch.int64), 5, False, 0, 0).shape == (0, 4)
