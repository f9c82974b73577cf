"""PairMask, the mining functions and the searches against dense numpy."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

import hpkernels as hk


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (4, 129), (70, 200), (0, 7), (7, 0)])
def test_round_trip_and_algebra(shape, device):
    a, b = (torch.rand(shape, device=device) < 0.3 for _ in range(2))
    p, q = hk.PairMask.from_dense(a), hk.PairMask.from_dense(b)
    assert p.shape == shape and p.nbytes == shape[0] * 16 * -(-shape[1] // 128)
    assert torch.equal(p.to_dense(), a)
    assert torch.equal((p & q).to_dense(), a & b)
    assert torch.equal((p | q).to_dense(), a | b)
    assert torch.equal((~p).to_dense(), ~a)
    assert torch.equal((~~p).bits, p.bits)  # padding stays zero
    assert torch.equal(p.T.to_dense(), a.T)
    assert torch.equal(p.sum(1), a.sum(1, dtype=torch.int32))
    assert torch.equal(p.sum(0), a.sum(0, dtype=torch.int32))
    assert p.sum() == a.sum()


def test_off_diagonal(device):
    a = torch.rand(40, 40, device=device) < 0.5
    expected = a & ~torch.eye(40, dtype=torch.bool, device=device)
    assert torch.equal(hk.PairMask.from_dense(a).off_diagonal().to_dense(), expected)


def test_from_labels(device):
    labels = torch.tensor([3, -1, 3, -1, 0, -2, 0, -2], device=device)
    for ignore in (-1, 0, -100):
        dense = (labels[:, None] == labels) & (labels != ignore) & ~torch.eye(8, dtype=torch.bool, device=device)
        mask = hk.PairMask.from_labels(labels, ignore_index=ignore)
        assert torch.equal(mask.to_dense(), dense) and mask.symmetric


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("ignore", [-1, 3, 255, 256, 65535, 2**32 - 1, None])
def test_labels_are_compared_as_numbers(dtype, ignore, device):
    """In torch a uint8 of 255 equals -1."""
    largest = torch.iinfo(dtype).max
    numbers = [largest, largest, 3, 3, 0] if dtype != torch.uint64 else [2**63 - 1, 2**63 - 1, 3, 3, 0]
    labels = torch.tensor(numbers, dtype=torch.int64).to(dtype).to(device)
    mask = hk.PairMask.from_labels(labels, ignore_index=ignore).to_dense()
    for i, j in np.ndindex(5, 5):
        assert mask[i, j] == (i != j and numbers[i] == numbers[j] != ignore)


def test_bools_are_labels(device):
    labels = torch.tensor([True, False, True, False, True], device=device)
    mask, as_numbers = (hk.PairMask.from_labels(each, ignore_index=None) for each in (labels, labels.long()))
    assert torch.equal(mask.bits, as_numbers.bits) and mask.sum() == 8
    assert hk.PairMask.from_labels(labels, ignore_index=0).sum() == 6


def philox_words(seed: int, row: int, word: int, group: int) -> list[int]:
    """Philox4x32-10 with Python integers."""
    c, k = [word, row, group, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answer():
    """Counter and key of all ones: from the generator's published test vectors (Random123, kat_vectors)."""
    c, k = [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2
    from hpkernels.ops.pair_bits.reference import philox

    words = philox(tuple(torch.tensor(v) for v in c), tuple(torch.tensor(v) for v in k))
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("seed", [0, 12345678901234567, -3])
def test_random_bits_follow_their_definition(rate, seed, backend, device):
    q = round(rate * 2**32)
    first = (q & -q).bit_length() - 1
    mask = hk.PairMask.random(rate, (3, 70), seed, device=device, backend=backend).to_dense().cpu().numpy()
    for row in range(3):
        for word in range(3):
            planes = [p for group in range(8) for p in philox_words(seed, row, word, group)]
            acc = 0
            for digit in range(first, 32):
                acc = acc | planes[digit] if q >> digit & 1 else acc & planes[digit]
            expected = [acc >> bit & 1 for bit in range(32)][: 70 - 32 * word]
            assert mask[row, 32 * word : 32 * word + 32].astype(int).tolist() == expected


def test_random_rate_and_independence(backend, device):
    mask = hk.PairMask.random(0.02, (784, 6272), 5, device=device, backend=backend)
    n = 784 * 6272
    assert abs(mask.sum().item() - 0.02 * n) < 5 * (0.02 * 0.98 * n) ** 0.5
    columns = mask.sum(0).double()
    assert columns.var().item() == pytest.approx(784 * 0.02 * 0.98, rel=0.1)  # columns are not copies of each other
    assert hk.PairMask.random(0.0, (3, 5), 1).sum() == 0 and hk.PairMask.random(1.0, (3, 5), 1).sum() == 15


def test_hidden_positives_with_a_pool(backend, device):
    centre = torch.randn(5, 16)
    features = (centre[torch.arange(200) % 5] + 0.5 * torch.randn(200, 16)).to(device)
    pool = (centre[torch.arange(30) % 5] + 0.5 * torch.randn(30, 16)).to(device)
    mask = hk.hidden_positives(features, pool, backend=backend)
    expected = oracle.positives(features.cpu().numpy(), pool.cpu().numpy())
    assert mask.symmetric and np.array_equal(mask.to_dense().cpu().numpy(), expected)


def test_hidden_positives_by_count(backend, device):
    features = torch.randn(150, 12, device=device)
    features[10] = features[20]  # an exact tie everywhere
    mask = hk.hidden_positives(features, positives_per_anchor=6, backend=backend).to_dense().cpu().numpy()
    expected = oracle.nearest(features.cpu().numpy(), 6)
    assert (mask == mask.T).all() and not mask.diagonal().any()
    assert (mask != expected).sum() <= 4  # rows 10 and 20 tie exactly; fp32 and fp64 may order them either way


def test_topk_ties_groups_and_missing(backend, device):
    queries = torch.eye(4, device=device).repeat(3, 1)
    values, indices = hk.topk_similarity(queries, queries, 3, backend=backend)
    assert indices.tolist() == [[i % 4, i % 4 + 4, i % 4 + 8] for i in range(12)]
    values, indices = hk.topk_similarity(queries, queries, 3, exclude_self=True, backend=backend)
    assert all(i not in row for i, row in enumerate(indices.tolist()))
    groups = torch.tensor([0] * 10 + [7, -5], device=device)
    values, indices = hk.topk_similarity(queries, queries, 3, query_groups=groups, key_groups=groups, backend=backend)
    assert indices[10].tolist() == [10, -1, -1] and values[10].tolist() == [1.0, -torch.inf, -torch.inf]
    assert (indices[:10] < 10).all()


@pytest.mark.parametrize("with_key_thresholds", [False, True])
def test_pairs_above_with_keys(with_key_thresholds, backend, device):
    x, keys = torch.randn(50, 9, device=device), torch.randn(33, 9, device=device)
    t, kt = torch.randn(50, device=device), torch.randn(33, device=device) if with_key_thresholds else None
    mask = hk.pairs_above(x, t, keys=keys, key_thresholds=kt, backend=backend)
    theta = t[:, None] if kt is None else torch.minimum(t[:, None], kt)
    assert torch.equal(mask.to_dense(), x.double() @ keys.double().T > theta) and not mask.symmetric


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [31, 32, 64])
def test_views_of_a_larger_mask_are_packed(rows, columns):
    """Whatever their strides and where they begin."""
    whole = torch.rand(7, 131, generator=torch.Generator().manual_seed(0)) < 0.5
    for view in (whole[1 : 1 + rows, :columns], whole[2 : 2 + rows, 5 : 5 + columns], whole.T[3 : 3 + rows, :7]):
        assert torch.equal(hk.PairMask.from_dense(view).to_dense(), view)
