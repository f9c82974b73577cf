"""The CUDA contrastive kernels on the host, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from hpkernels import tuning
from hpkernels.common.bits import pack, unpack
from hpkernels.ops.contrastive import reference, workspace
from hpkernels.ops.contrastive.masks import Masks
from tests.guard import before_guard_page

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DENOMINATORS = (("all", None), ("dense", 0.3), ("sparse", 0.1), ("sparse", None))  # with the rate of the negatives


pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
    """Statistics and gradient of the anchors first_row ... + n against the reference in fp64; twice the same bits."""
    streams, total, _ = x.shape
    rows = slice(first_row, total if n is None else first_row + n)
    part = [None if mask is None else mask[rows] for mask in masks[:4]] + [masks[4]]
    part = Masks(*part, denominator, first_row)
    whole = reference.contrastive_stats(x.double(), Masks(*masks, denominator), temperature)
    stats = contrastive.contrastive_stats(x, part, temperature)
    for ours, oracle in zip(stats, whole, strict=True):
        oracle = oracle[:, rows]
        assert ours.dtype == torch.float32 and ours.shape == oracle.shape
        scale = max(1 / temperature, oracle.abs().max() if oracle.numel() else 0)  # of the logits, and of the shift
        assert ((ours - oracle).abs() < 1e-6 * scale).all()
    tables = [1e-4 * torch.randn(streams, total) for _ in range(3)]
    for table in tables:
        table[:, ::3] = 0  # rows without gradient are common
    arguments = (part, temperature, whole[0].float(), *tables)
    exact = (whole[0], *[table.double() for table in tables])
    oracle = reference.contrastive_grad(x.double(), part, temperature, *exact)
    weights = 4e-6 if x.dtype == torch.float32 else 1e-3 if x.dtype == torch.float16 else 4e-3  # G in x's dtype
    for route in ("lists",) if denominator == "sparse" else ("fused", "workspace"):
        with tuning.forced("contrastive_grad", {"route": route}):
            grad = contrastive.contrastive_grad(x, *arguments)
            assert torch.equal(grad, contrastive.contrastive_grad(x, *arguments))
        assert grad.dtype == x.dtype and grad.shape == oracle.shape
        assert (grad - oracle).norm() <= weights * oracle.norm() + 2 * (oracle.to(x.dtype) - oracle).norm()
    again = contrastive.contrastive_stats(x, part, temperature)
    assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator, rate", DENOMINATORS)
@pytest.mark.parametrize("n, d", [(1, 16), (2, 7), (66, 40), (132, 72)])
def test_shapes(contrastive, denominator, rate, n, d, dtype):
    period = {1: 1, 2: 2, 66: 6, 132: 2}[n]
    _check(contrastive, _units(1, n, d, dtype), _masks(n, period, rate, n % 4 == 0, d != 40), denominator, 0.5)


@pytest.mark.parametrize("first_row, n", [(0, 17), (37, 101), (130, 3), (32, 0)])
@pytest.mark.parametrize("denominator, rate", DENOMINATORS)
def test_ranges_of_anchors(contrastive, denominator, rate, first_row, n):
    masks = _masks(150, 15, rate, symmetric=False, extra=True)
    _check(contrastive, _units(2, 150, 16), masks, denominator, 0.5, first_row, n)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.07])
@pytest.mark.parametrize("denominator, rate", DENOMINATORS)
def test_low_temperatures(contrastive, denominator, rate, temperature):
    _check(contrastive, _units(2, 66, 16), _masks(66, 6, rate, True, True), denominator, temperature)


def test_lists_of_several_tiles(contrastive):
    """Several panels, tiles of columns, tiles of rows that share a list; lists beyond the room of one filling."""
    n = 4250
    dense = torch.rand(n, n) < 0.02
    masks = [pack(dense), pack(dense.T.contiguous()), None, None, pack(torch.rand(2, n) < 0.999)]
    _check(contrastive, _units(1, n, 8), masks, "sparse", 0.5, 4101, 70)


def test_windows_share_the_workspace(contrastive, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1)
    _check(contrastive, _units(1, 66, 24), _masks(66, 6, 0.3, True, False), "sparse", 0.5, 3, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_side_that_finds_no_room_is_summed_from_the_bits(contrastive, dtype, monkeypatch):
    monkeypatch.setattr(contrastive, "_column_capacity", lambda period, n: period)
    _check(contrastive, _units(1, 70, 16, dtype), _masks(70, 5, 0.5, False, True), "sparse", 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_the_workspace(contrastive, dtype, monkeypatch):
    """Several, the first of them beginning before the anchors."""
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 0)
    masks = _masks(150, 50, 0.2, symmetric=False, extra=True)
    _check(contrastive, _units(1, 150, 24, dtype), masks, "dense", 0.5, 37, 101)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", ["dense", "sparse"])
def test_wide_rows(contrastive, denominator, dtype):
    """More columns of x than a panel sums: it takes them in pieces."""
    _check(contrastive, _units(1, 6, 530, dtype), _masks(6, 1, 0.3, True, True), denominator, 0.5)


@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
def test_empty_masks_and_nan(contrastive, denominator):
    n = 40
    empty, full = (pack(torch.full((n, n), value)) for value in (False, True))
    negatives = None if denominator == "all" else pack(torch.zeros(10, n, dtype=torch.bool))
    x, ones = _units(1, n, 16), torch.ones(1, n)
    bare = (Masks(empty, negatives=negatives, denominator=denominator), 0.5)
    lse, pos, ext = contrastive.contrastive_stats(x, *bare)
    assert not pos.any() and not ext.any()
    assert (lse == 0).all() if denominator != "all" else (lse != 0).all()
    grad = contrastive.contrastive_grad(x, *bare, lse, ones, ones, ones)
    assert grad.isfinite().all() and (denominator == "all" or not grad.any())
    x[0, 7, 3] = torch.nan
    lse = contrastive.contrastive_stats(x, Masks(full, negatives=negatives, denominator=denominator), 0.5)[0]
    assert lse.isnan().all()


@pytest.mark.parametrize("denominator", ["dense", "sparse"])
def test_all_pairs_positive_and_the_diagonal(contrastive, denominator):
    """Full masks, their diagonals set: only j != i counts."""
    n = 33
    full = pack(torch.ones(n, n, dtype=torch.bool))
    masks = [full, None, full, None, pack(torch.ones(11, n, dtype=torch.bool))]
    _check(contrastive, _units(1, n, 16), masks, denominator, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", ["dense", "sparse"])
def test_errors_are_at_most_twice_those_of_torch(contrastive, denominator, dtype):
    """Plain torch on the same operands: G in fp32 and, for 16-bit x, rounded to x's dtype for the product."""
    n, temperature = 260, 0.1
    x, masks = _units(1, n, 64, dtype), _masks(n, 4, 0.2, True, True)
    tables = [torch.randn(1, n) for _ in range(3)]
    arguments = (Masks(*masks, denominator), temperature)
    exact = reference.contrastive_stats(x.double(), *arguments)
    plain = reference.contrastive_stats(x.float(), *arguments)
    stats = contrastive.contrastive_stats(x, *arguments)
    for ours, torch_s, oracle in zip(stats, plain, exact, strict=True):
        assert (ours - oracle).norm() <= 2 * (torch_s - oracle).norm()
    lse = exact[0].float()
    grad = contrastive.contrastive_grad(x, *arguments, lse, *tables)
    oracle = reference.contrastive_grad(x.double(), *arguments, exact[0], *[table.double() for table in tables])
    P, Q, M = (unpack(masks[m], n) for m in (0, 2, 4))
    values = x[0].float()
    p = (P | M.repeat(n // len(M), 1)) * torch.exp(values @ values.T / temperature - lse.T)
    G = tables[0].T * p + tables[1].T * P + tables[2].T * Q
    G = (G + G.T).fill_diagonal_(0).to(dtype)
    plain = (G.float() @ values / temperature).to(dtype)
    assert (grad - oracle).norm() <= 2 * (plain - oracle).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
def test_no_operand_is_read_past_its_end(contrastive, denominator, dtype):
    n, first_row, anchors = 132, 61, 71  # the last anchor is the last row
    masks = _masks(n, 4, None if denominator == "all" else 0.2, symmetric=False, extra=True)
    part = [before_guard_page(mask[first_row:]) for mask in masks[:4]] + [before_guard_page(masks[4])]
    part = Masks(*part, denominator, first_row)
    x = before_guard_page(_units(1, n, 24, dtype))
    tables = [before_guard_page(torch.rand(1, n)) for _ in range(4)]
    expected = reference.contrastive_stats(x.double(), part, 0.5)
    stats = contrastive.contrastive_stats(x, part, 0.5)
    for ours, oracle in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.double(), oracle, atol=1e-4, rtol=0)
    for route in ("fused", "workspace"):
        with tuning.forced("contrastive_grad", {"route": route}):
            grad = contrastive.contrastive_grad(x, part, 0.5, *tables)
        assert grad.shape == (1, anchors, 24) and grad.isfinite().all()
