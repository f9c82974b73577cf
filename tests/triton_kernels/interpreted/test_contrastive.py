"""Statistics and gradient of the masked contrastive loss against the fp64 definition."""

from __future__ import annotations

import pytest
import torch

from hpkernels import tuning
from hpkernels.common.bits import pack
from hpkernels.ops.contrastive import reference, workspace
from hpkernels.ops.contrastive import triton as kernels
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.triton import lists, sparse_grad


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch):
    """The interpreter pays for programs: same code, smaller grids."""
    monkeypatch.setattr(sparse_grad, "_COLUMN_SPLITS", 2)
    monkeypatch.setattr(sparse_grad, "_SUM_PROGRAMS", 16)


def _masks(n, tokens, rate, symmetric, extra):
    def mask():
        dense = torch.rand(n, n) < 0.05  # the diagonal may be set: it must not count
        return dense | dense.T if symmetric else dense

    P, Q = mask(), mask() if extra else None
    turn = lambda dense: None if symmetric or dense is None else pack(dense.T.contiguous())  # noqa: E731
    negatives = None if rate is None else pack(torch.rand(tokens, n) < rate)
    return pack(P), turn(P), None if Q is None else pack(Q), turn(Q), negatives


def _check(x, masks, denominator, temperature):
    masks = Masks(*masks, denominator)
    stats = kernels.contrastive_stats(x, masks, temperature)
    expected = reference.contrastive_stats(x.double(), masks, temperature)
    for ours, oracle in zip(stats, expected, strict=True):
        scale = oracle.abs().amax().clamp_min(1 / temperature)  # the size of the logits, and of the shift
        assert (ours - oracle).abs().amax() < 1e-6 * scale
    n = x.shape[1]
    gradients = [1e-4 * torch.randn(x.shape[0], n) for _ in range(3)]
    for g in gradients:
        g[:, ::3] = 0  # rows without gradient are common
    lse = expected[0].float()
    grad = kernels.contrastive_grad(x, masks, temperature, lse, *gradients)
    oracle = reference.contrastive_grad(x.double(), masks, temperature, expected[0], *[g.double() for g in gradients])
    assert grad.dtype == x.dtype and grad.shape == x.shape
    weights = 2e-6 if x.dtype == torch.float32 else 1e-3  # G is rounded to x's dtype
    rounding = (oracle.to(x.dtype) - oracle).norm()  # of the result: small gradients are subnormal in fp16
    assert (grad - oracle).norm() <= weights * oracle.norm() + 2 * rounding
    if n > 66:
        return
    again = kernels.contrastive_grad(x, masks, temperature, lse, *gradients)
    assert torch.equal(grad, again)


@pytest.mark.parametrize("denominator", ["all", "dense"])
def test_dense(n, d, denominator, dtype, units):
    if n == 784 and denominator == "dense":
        pytest.skip("covered by 196 rows; slow under the interpreter")
    tokens = n // 2 if n % 2 == 0 else n
    masks = _masks(n, tokens, None if denominator == "all" else 0.3, symmetric=n % 2 == 1, extra=d != 48)
    _check(units(1, n, d, dtype=dtype), masks, denominator, 0.5)


def test_sparse(n, d, dtype, units):
    if n == 784:
        pytest.skip("minutes under the interpreter; same code as for 196 rows")
    tokens = next(t for t in (28, 21, 13, 43, 2, 1) if n % t == 0)
    masks = _masks(n, tokens, 0.04, symmetric=n % 2 == 1, extra=d != 48)
    _check(units(1, n, d, dtype=dtype), masks, "sparse", 0.5)


@pytest.mark.parametrize("temperature", [0.01, 0.07])
@pytest.mark.parametrize("denominator, rate", [("all", None), ("dense", 0.2), ("sparse", 0.2), ("sparse", None)])
def test_two_streams_and_low_temperature(denominator, rate, temperature, units, splits):
    masks = _masks(66, 11, rate, symmetric=True, extra=True)
    _check(units(2, 66, 16), masks, denominator, temperature)


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_sparse_lists_that_find_no_room_are_walked(rate, units, monkeypatch):
    monkeypatch.setattr(lists, "_LIST_SHARE", (0, 1))
    monkeypatch.setattr(lists, "_LIST_MULTIPLE", 64)
    _check(units(1, 40, 16), _masks(40, 10, rate, symmetric=False, extra=True), "sparse", 0.5)


def test_sparse_windows_share_the_workspace(units, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(sparse_grad, "_SUM_PROGRAMS", 4)
    _check(units(1, 60, 16), _masks(60, 6, 0.1, symmetric=True, extra=False), "sparse", 0.5)


@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
def test_empty_masks_and_nan(denominator, units):
    n = 40
    empty = pack(torch.zeros(n, n, dtype=torch.bool))
    negatives = None if denominator == "all" else pack(torch.zeros(10, n, dtype=torch.bool))
    x = units(1, n, 16)
    masks = Masks(empty, negatives=negatives, denominator=denominator)
    lse, pos, ext = kernels.contrastive_stats(x, masks, 0.5)
    assert not pos.any() and not ext.any()
    assert (lse == 0).all() if denominator != "all" else (lse != 0).all()
    ones = torch.ones(1, n)
    grad = kernels.contrastive_grad(x, masks, 0.5, lse, ones, ones, ones)
    assert grad.isfinite().all() and (denominator == "all" or not grad.any())
    x[0, 7, 3] = torch.nan
    full = pack(torch.ones(n, n, dtype=torch.bool))
    masks = Masks(full, negatives=negatives, denominator=denominator)
    assert kernels.contrastive_stats(x, masks, 0.5)[0].isnan().all()


def test_the_diagonal_never_counts(units):
    n, x = 33, units(1, 33, 16)
    diagonal, table = pack(torch.eye(n, dtype=torch.bool)), pack(torch.ones(11, n, dtype=torch.bool))
    bare = pack(torch.zeros(n, n, dtype=torch.bool))
    for denominator in ("dense", "sparse"):
        with_it = kernels.contrastive_stats(x, Masks(diagonal, None, diagonal, None, table, denominator), 0.5)
        without = kernels.contrastive_stats(x, Masks(bare, None, bare, None, table, denominator), 0.5)
        for a, b in zip(with_it, without, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("first_row, n", [(0, 17), (17, 40), (33, 47), (79, 1), (32, 0)])
@pytest.mark.parametrize("denominator, tokens", [("all", None), ("dense", 20), ("sparse", 20), ("sparse", None)])
def test_a_range_of_anchors_equals_that_slice_of_the_whole(denominator, tokens, first_row, n, units, splits):
    x = units(2, 80, 16)
    masks = _masks(80, tokens, None if tokens is None else 0.2, symmetric=False, extra=True)
    rows = slice(first_row, first_row + n)
    part = [mask if mask is None else mask[rows] for mask in masks[:4]] + [masks[4]]
    masks, part = Masks(*masks, denominator), Masks(*part, denominator, first_row)
    expected = reference.contrastive_stats(x.double(), masks, 0.5)
    for ours, oracle in zip(reference.contrastive_stats(x.double(), part, 0.5), expected, strict=True):
        torch.testing.assert_close(ours, oracle[:, rows])
    stats = kernels.contrastive_stats(x, part, 0.5)
    for ours, oracle in zip(stats, expected, strict=True):
        assert ours.shape == (2, n)
        torch.testing.assert_close(ours.double(), oracle[:, rows], atol=1e-5, rtol=0)
    lse, gradients = expected[0].float(), [torch.randn(2, 80) for _ in range(3)]
    oracle = reference.contrastive_grad(x.double(), masks, 0.5, expected[0], *[g.double() for g in gradients])[:, rows]
    exact = [v.double() for v in (expected[0], *gradients)]
    of_part = reference.contrastive_grad(x.double(), part, 0.5, *exact)
    torch.testing.assert_close(of_part, oracle)
    grad = kernels.contrastive_grad(x, part, 0.5, lse, *gradients)
    assert grad.shape == (2, n, 16)
    assert (grad - oracle).norm() <= 2e-6 * oracle.norm()


@pytest.mark.parametrize("route", ["fused", "workspace"])
@pytest.mark.parametrize("first_row, n", [(0, 150), (37, 101)])
@pytest.mark.parametrize("temperature", [0.5, 0.04])
def test_routes_of_the_dense_gradient(route, first_row, n, temperature, dtype, units, monkeypatch):
    """Several blocks of the workspace, the first of them beginning before the anchors."""
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 0)
    x = units(2, 150, 24, dtype=dtype)
    masks = _masks(150, 50, 0.2, symmetric=False, extra=True)
    part = [mask[first_row : first_row + n] for mask in masks[:4]] + [masks[4]]
    masks, part = Masks(*masks, "dense"), Masks(*part, "dense", first_row)
    gradients = [1e-4 * torch.randn(2, 150) for _ in range(3)]
    lse = reference.contrastive_stats(x.double(), masks, temperature)[0]
    oracle = reference.contrastive_grad(x.double(), masks, temperature, lse, *[g.double() for g in gradients])[
        :, first_row : first_row + n
    ]
    with tuning.forced("contrastive_grad", {"route": route}):
        grad = kernels.contrastive_grad(x, part, temperature, lse.float(), *gradients)
    assert grad.dtype == dtype
    weights = 4e-6 if dtype == torch.float32 else 1e-3
    assert (grad - oracle).norm() <= weights * oracle.norm() + 2 * (oracle.to(dtype) - oracle).norm()
