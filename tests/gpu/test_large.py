"""More than 2^31 elements in real GPU memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hpkernels as hk

CUDA = torch.device("cuda")
GIB = 1 << 30


def _needs(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free // GIB} are free")


def test_search_over_rows_beyond_int32_offsets(on: str) -> None:
    """2^31 and more numbers in the queries: the last rows have the answers of the first, which they repeat."""
    _needs(24)
    base = F.normalize(torch.randn(1 << 10, 512, device=CUDA), dim=1).bfloat16()
    queries = base.repeat((1 << 12) + 8, 1)
    assert queries.numel() > 1 << 31
    keys = F.normalize(torch.randn(300, 512, device=CUDA), dim=1).bfloat16()
    best = hk.max_similarity(queries, keys, backend=on).view(-1, len(base))
    assert torch.equal(best, best[:1].expand_as(best))
    torch.testing.assert_close(best[0], (base.float() @ keys.float().T).amax(1), rtol=1e-4, atol=1e-5)
    values, indices = hk.topk_similarity(queries, keys, 4, backend=on)
    for table in (values, indices):
        table = table.view(-1, *table[: len(base)].shape)
        assert torch.equal(table, table[:1].expand_as(table))


def test_bits_beyond_int32_offsets(on: str) -> None:
    """2^31 words of bits: the last rows hold the pairs of the first, which they repeat."""
    _needs(24)
    base = F.normalize(torch.randn(1 << 10, 64, device=CUDA), dim=1).bfloat16()
    x = base.repeat((1 << 12) + 1, 1)
    keys = F.normalize(torch.randn(1 << 14, 64, device=CUDA), dim=1).bfloat16()
    thresholds = torch.full((len(x),), 0.3, device=CUDA)
    bits = hk.pairs_above(x, thresholds, keys=keys, backend=on).bits
    assert bits.numel() > 1 << 31
    for rows in bits.split(1 << 10):
        assert torch.equal(rows, bits[: 1 << 10])
    assert bits[: 1 << 10].any()


def test_loss_with_bits_beyond_int32_offsets(on: str) -> None:
    """262,144 anchors, each with its twin as its one positive and its whole denominator: loss and gradient are 0."""
    _needs(48)
    half = (1 << 17) + 64
    twins = F.normalize(torch.randn(half, 256, device=CUDA), dim=1)
    noise = F.normalize(torch.randn(half, 256, device=CUDA), dim=1)
    pool = F.normalize(0.95 * twins + 0.31 * noise, dim=1).bfloat16()
    features = twins.bfloat16().repeat(2, 1)
    z = torch.randn(2 * half, 16, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    loss, stats = hk.hidden_positive_loss(z, features, pool, negative_rate=0.0, return_stats=True, backend=on)
    loss.backward()
    assert float(stats.positives_per_anchor) == 1.0 and float(stats.kept_fraction) == 1.0
    assert abs(float(loss)) < 1e-4 and float(z.grad.float().abs().max()) < 1e-6
