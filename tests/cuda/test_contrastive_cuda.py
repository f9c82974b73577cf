"""The CUDA contrastive kernels on the host, against the reference in fp64."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from hpkernels._bits import pack
from hpkernels.ops.contrastive import common, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# denominator, rows of the negatives for 3 images, rate of the negatives
DENOMINATORS = (("all", None), ("dense", 0.3))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN or the largest integer: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _units(streams: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unit rows, some of them close to each other: logits of every size."""
    x = torch.randn(streams, n, d) + 2 * torch.randn(streams, 1, d) * (torch.arange(n) % 3 == 0)[:, None]
    return torch.nn.functional.normalize(x, dim=2).to(dtype)


def _masks(n: int, period: int | None, rate: float | None, symmetric: bool, extra: bool) -> list[torch.Tensor | None]:
    """P, its transpose, Q, its transpose, M; the diagonal is set in places and must not count."""

    def mask():
        dense = torch.rand(n, n) < 0.1
        return dense | dense.T if symmetric else dense

    P, Q = mask(), mask() if extra else None
    P[n // 2] = P[:, n // 2] = False  # a row without positives
    turned = [None if symmetric or dense is None else pack(dense.T.contiguous()) for dense in (P, Q)]
    negatives = None if rate is None else pack(torch.rand(period, n) < rate)
    return [pack(P), turned[0], None if Q is None else pack(Q), turned[1], negatives]


def _check(contrastive, x, masks, denominator, temperature, first_row=0, n=None):
    """Statistics and gradient of the anchors first_row ... + n against the reference in fp64, and against themselves."""
    streams, total, _ = x.shape
    rows = slice(first_row, total if n is None else first_row + n)
    part = [None if mask is None else mask[rows] for mask in masks[:4]] + [masks[4]]
    whole = reference.contrastive_stats(x.double(), *masks, denominator, temperature, 0)
    stats = contrastive.contrastive_stats(x, *part, denominator, temperature, first_row)
    for ours, oracle in zip(stats, whole, strict=True):
        oracle = oracle[:, rows]
        assert ours.dtype == torch.float32 and ours.shape == oracle.shape
        scale = max(1 / temperature, oracle.abs().max() if oracle.numel() else 0)  # of the logits, and of the shift
        assert ((ours - oracle).abs() < 1e-6 * scale).all()
    tables = [1e-4 * torch.randn(streams, total) for _ in range(3)]
    for table in tables:
        table[:, ::3] = 0  # rows without gradient are common
    arguments = (denominator, temperature, first_row, whole[0].float(), *tables)
    grad = contrastive.contrastive_grad(x, *part, *arguments)
    exact = (whole[0], *[table.double() for table in tables])
    oracle = reference.contrastive_grad(x.double(), *part, denominator, temperature, first_row, *exact)
    assert grad.dtype == x.dtype and grad.shape == oracle.shape
    weights = 4e-6 if x.dtype == torch.float32 else 1e-3 if x.dtype == torch.float16 else 4e-3  # G in x's dtype
    assert (grad - oracle).norm() <= weights * oracle.norm() + 2 * (oracle.to(x.dtype) - oracle).norm()
    again = contrastive.contrastive_stats(x, *part, denominator, temperature, first_row)
    assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))
    assert torch.equal(grad, contrastive.contrastive_grad(x, *part, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator, rate", DENOMINATORS)
@pytest.mark.parametrize("n, d", [(1, 16), (2, 7), (66, 40), (132, 72)])
def test_shapes(contrastive, denominator, rate, n, d, dtype):
    period = max(1, n // 2)
    _check(contrastive, _units(1, n, d, dtype), _masks(n, period, rate, n % 4 == 0, d != 40), denominator, 0.5)


@pytest.mark.parametrize("first_row, n", [(0, 17), (37, 101), (130, 3), (32, 0)])
@pytest.mark.parametrize("denominator, rate", DENOMINATORS)
def test_ranges_of_anchors(contrastive, denominator, rate, first_row, n):
    masks = _masks(150, 50, rate, symmetric=False, extra=True)
    _check(contrastive, _units(2, 150, 16), masks, denominator, 0.5, first_row, n)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.07])
@pytest.mark.parametrize("denominator, rate", DENOMINATORS)
def test_low_temperatures(contrastive, denominator, rate, temperature):
    _check(contrastive, _units(2, 66, 16), _masks(66, 22, rate, True, True), denominator, temperature)
