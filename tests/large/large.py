"""Element offsets past 2^31 in every CPU kernel: python -m tests.large.large NAME, started by test_large_native.py.

Arrays are strided far apart, or one short array is repeated over much address space (mapped.py), so that the results
are those of the short one. Cases of LONG go through 2^31 elements, which takes seconds.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from hpkernels import _cpu
from hpkernels.common.bits import pack
from hpkernels.ops.contrastive import cpu as contrastive
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.local_mix import cpu as local_mix
from hpkernels.ops.local_mix.weighting import Weighting
from hpkernels.ops.normalize import cpu as normalize
from hpkernels.ops.pair_bits import cpu as pair_bits
from hpkernels.ops.similarity_search import cpu as search
from tests.large.mapped import Repeated, Sparse

FAR = 1 << 31
ROWS, STRIDE = 40, 1 << 26  # of rows that lie far apart: those from 32 on are past 2^31
THREADS = 2
_kept = []  # memory that kernels are given by address


def spread(rows: Tensor, stride: int = STRIDE) -> int:
    """The address of the rows of a matrix, `stride` elements apart."""
    memory = Sparse(len(rows) * stride, rows.dtype)
    for r, row in enumerate(rows):
        memory.at(r * stride, len(row)).copy_(row)
    _kept.append(memory)
    return memory.address


def repeated(period: Tensor, times: int) -> Repeated:
    _kept.append(Repeated(period, times * period.numel()))
    return _kept[-1]


def check_repeats(memory: Repeated, expected: Tensor) -> None:
    """At the start, at 2^31 elements and at the end; all the same memory, unless something else was written."""
    assert torch.equal(memory.at(0, expected.numel()), expected.flatten())


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def set_pairs():
    indices = torch.randint(0, ROWS, (ROWS, 3))
    memory = Sparse(ROWS * STRIDE, torch.int32)
    _cpu.set_pairs(indices.data_ptr(), ROWS, 3, 32 * STRIDE, True, 0, ROWS, memory.address)
    expected = pair_bits.pairs_from_indices(indices, ROWS, True, 0, ROWS)[:, :2]
    assert torch.equal(torch.stack([memory.at(r * STRIDE, 2) for r in range(ROWS)]), expected)


def random_bits():
    """Few rows of many columns, written over one another: all that shows is where they end."""
    rows, words = 3, FAR // 2 + 1024
    far = repeated(torch.zeros(1 << 20, dtype=torch.int32), rows * words // (1 << 20) + 1)
    _cpu.random_bits(5, rows, 32 * words, 1 << 31, far.address, THREADS)
    assert far.at(0, 1 << 20).any()


def contrastive_masks():
    """Rows of bits far apart; without negatives where these are transposed, which takes all of a row."""
    x, tables = unit(1, ROWS, 7), torch.randn(4, 1, ROWS)
    masks = [torch.rand(ROWS, ROWS) < 0.3 for _ in range(3)]
    masks = [torch.nn.functional.pad(mask, (0, 128 - ROWS)) for mask in masks]
    bits = [pack(mask) for mask in masks]
    turned = [pack(torch.nn.functional.pad(mask[:, :ROWS].T, (0, 128 - ROWS))) for mask in masks[:2]]
    far_bits = [spread(mask) for mask in (bits[0], turned[0], bits[1], turned[1], bits[2])]
    for denominator in ("sparse", "dense"):
        negatives = bits[2] if denominator == "sparse" else None
        given = Masks(bits[0], turned[0], bits[1], turned[1], negatives, denominator)
        far = _cpu.ContrastiveMasks(*far_bits[:4], far_bits[4] if denominator == "sparse" else 0, STRIDE, ROWS)
        expected = contrastive.contrastive_stats(x, given, 0.3)
        found = torch.zeros(3, 1, ROWS)
        _cpu.contrastive_stats_f32(
            x.data_ptr(), 1, ROWS, 7, 0, ROWS, far, denominator, 0.3, *(part.data_ptr() for part in found), THREADS
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        grad = torch.empty(1, ROWS, 7)
        _cpu.contrastive_grad_f32(
            x.data_ptr(),
            1,
            ROWS,
            7,
            0,
            ROWS,
            far,
            denominator,
            0.3,
            *(t.data_ptr() for t in tables),
            grad.data_ptr(),
            THREADS,
        )
        assert torch.equal(grad, contrastive.contrastive_grad(x, given, 0.3, *tables))


def neighbor_weights_qk():
    """Images, then rows, far apart."""
    queries, keys = torch.randn(2, ROWS, 1, 4, 5)
    flat = [x[:, 0] for x in (queries, keys)]  # (images, T, d)
    expected = local_mix.neighbor_weights_qk(queries, keys, 0.4, Weighting(2, 2, 28.0, 0.1, 0.9))
    for by_row in (False, True):
        if by_row:
            addresses = [spread(x[:10].flatten(0, 1)) for x in flat]
            images, strides = 10, (4 * STRIDE, STRIDE)
        else:
            addresses, images, strides = [spread(x.flatten(1)) for x in flat], ROWS, (STRIDE, 5)
        found = torch.empty(images, 4, 9)
        _cpu.neighbor_weights_qk_f32(
            addresses[0],
            *strides,
            addresses[1],
            *strides,
            images,
            5,
            2,
            2,
            0.4,
            28.0,
            0.1,
            0.9,
            found.data_ptr(),
            THREADS,
        )
        assert torch.equal(found, expected[:images])


def many_normalized_rows():
    times, x, g = (FAR >> 20) + 1, torch.randn(1 << 16, 16), torch.randn(1 << 16, 16)
    far_x, far_g, out = repeated(x, times), repeated(g, times), repeated(torch.zeros_like(x), times)
    assert _cpu.normalize_rows(False, far_x.address, times << 16, 16, out.address, THREADS)
    check_repeats(out, normalize.normalize_rows(x, "x"))
    _cpu.normalize_rows_grad(False, far_g.address, far_x.address, times << 16, 16, out.address, THREADS)
    check_repeats(out, normalize.normalize_rows_grad(g, x))


def many_bits():
    """Counted, and transposed: all columns alike, as one piece of memory serves all rows of the result."""
    times, rows = (FAR >> 23) + 1, 1 << 21
    bits = pair_bits.random_bits(torch.tensor(3), rows, 128, 0.5)
    far, counts = repeated(bits, times), repeated(torch.zeros(rows, dtype=torch.int32), times)
    _cpu.count_bits(far.address, times * rows, 4, counts.address, THREADS)
    check_repeats(counts, pair_bits.count_bits(bits)[0])
    alike = torch.where(torch.rand(rows, 1) < 0.5, -1, 0).int().repeat(1, 4)
    far = repeated(alike, times)
    turned = pair_bits.transpose_bits(alike, 128)
    out = repeated(torch.zeros(rows // 32, dtype=torch.int32), 128 * times)
    _cpu.transpose_bits(far.address, times * rows, 128, out.address, THREADS)
    check_repeats(out, turned[0])


def many_mixed_tokens():
    times, size = (FAR >> 20) + 1, (1 << 10, 8, 8, 16)  # images of a period, grid, numbers of a token
    images, tokens = times * size[0], 64
    code, g = torch.randn(size[0], tokens, 16), torch.randn(size[0], tokens, 16)
    weights = torch.rand(size[0], tokens, 9)
    far_code, far_g, far_weights = (repeated(x, times) for x in (code, g, weights))
    out, grad_weights = repeated(torch.zeros_like(code), times), repeated(torch.zeros_like(weights), times)
    _cpu.neighbor_mix_f32(far_code.address, far_weights.address, images, 8, 8, 16, out.address, THREADS)
    check_repeats(out, local_mix.neighbor_mix(code, weights, 8, 8))
    _cpu.neighbor_mix_grad_f32(
        far_g.address,
        far_code.address,
        far_weights.address,
        images,
        8,
        8,
        16,
        out.address,
        grad_weights.address,
        THREADS,
    )
    expected = local_mix.neighbor_mix_grad(g, code, weights, 8, 8, True, True)
    check_repeats(out, expected[0])
    check_repeats(grad_weights, expected[1])


def many_attention_heads():
    """All but the last heads are zero; the mean over 2^17 of them is exact."""
    heads, tokens = 1 << 17, 128
    last = torch.randn(tokens, tokens)
    memory = Sparse(heads * tokens * tokens, torch.float32)
    memory.at((heads - 1) * tokens * tokens, tokens * tokens).copy_(last.flatten() * heads)
    found = torch.empty(1, tokens, 9)
    _cpu.neighbor_weights_f32(memory.address, 1, heads, 8, 16, 28.0, 0.1, 0.9, found.data_ptr(), THREADS)
    assert torch.equal(found, local_mix.neighbor_weights(last[None], Weighting(8, 16, 28.0, 0.1, 0.9)))


def many_assigned_rows():
    """In one thread: labels are read back, and here the rows of two threads share them."""
    times, rows = (FAR >> 20) + 1, 1 << 16
    x, centroids = torch.randn(rows, 16), torch.randn(3, 16)
    bias = -centroids.square().sum(1) / 2
    far = repeated(x, times)
    labels, distances = repeated(torch.zeros(rows, dtype=torch.int64), times), repeated(torch.zeros(rows), times)
    sums, counts = torch.zeros(3, 16, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    given = (centroids.data_ptr(), centroids.data_ptr(), bias.data_ptr(), 3)
    assert _cpu.cluster_assign_f32(
        far.address, times * rows, 16, *given, labels.address, distances.address, sums.data_ptr(), counts.data_ptr(), 1
    )
    squared = torch.cdist(x.double(), centroids.double()).square()
    check_repeats(labels, squared.argmin(1))
    assert torch.equal(counts, times * torch.bincount(squared.argmin(1)))
    exact = torch.zeros(3, 16, dtype=torch.float64).index_add_(0, squared.argmin(1), x.double()) * times
    torch.testing.assert_close(sums, exact, rtol=1e-9, atol=1e-6)


def many_keys():
    """Searched by few queries: packed, they take gigabytes."""
    times, rows = (FAR >> 20) + 1, 1 << 16
    keys, queries = unit(rows, 16), unit(5, 16)
    far, total = repeated(keys, times), times * rows
    values = torch.empty(5)
    _cpu.max_similarity_f32(queries.data_ptr(), 5, far.address, total, 16, values.data_ptr(), THREADS)
    expected = search.max_similarity(queries, keys)
    assert torch.equal(values, expected)
    limits, words = search.topk_similarity(queries, keys, 40, False, None, None)[0][:, -1].contiguous(), total // 32
    bits = Sparse(5 * words, torch.int32)
    _cpu.pairs_above_f32(
        queries.data_ptr(), 5, far.address, total, 16, False, limits.data_ptr(), 0, bits.address, words, THREADS
    )
    near = search.pairs_above(queries, limits, keys, None)
    for r in range(5):
        for start in (0, times // 2 * rows // 32, words - rows // 32):
            assert torch.equal(bits.at(r * words + start, rows // 32), near[r])


def pairs_of_wide_rows():
    """Rows of bits far apart, padded with zeros to their end; their beginnings are memory of their own."""
    x, limits, page = unit(ROWS, 9), torch.full((ROWS,), 0.1), 1024
    memory = repeated(torch.ones(1 << 20, dtype=torch.int32), ROWS * STRIDE >> 20)
    for r in range(ROWS):
        memory.own(r * STRIDE, page)
    _cpu.pairs_above_f32(
        x.data_ptr(), ROWS, x.data_ptr(), ROWS, 9, True, limits.data_ptr(), limits.data_ptr(), memory.address, STRIDE, 1
    )
    expected = torch.nn.functional.pad(search.pairs_above(x, limits, None, None), (0, page - 4))
    assert torch.equal(torch.stack([memory.at(r * STRIDE, page) for r in range(ROWS)]), expected)
    assert not memory.at(page, 1 << 20).any()


QUICK = (set_pairs, neighbor_weights_qk)
LONG = (
    contrastive_masks, random_bits, pairs_of_wide_rows, many_normalized_rows, many_bits, many_mixed_tokens,
    many_attention_heads, many_assigned_rows, many_keys,
)  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    {case.__name__: case for case in QUICK + LONG}[sys.argv[1]]()
