"""Neighbour weights, mixing and its gradient against plain torch."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.local_mix import reference
from hpkernels.ops.local_mix import triton as kernels

SLOW = [pytest.param(grid, marks=pytest.mark.slow) for grid in ((3, 21), (3, 43), (14, 14), (28, 28))]
GRIDS = [(1, 1), (1, 2), (5, 13), *SLOW]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("heads", [None, 3])
def test_neighbor_weights(grid, heads, dtype):
    tokens = grid[0] * grid[1]
    attention = torch.randn(*((1, tokens) if heads is None else (1, heads, tokens)), tokens).to(dtype)
    ours = kernels.neighbor_weights(attention, *grid, 28.0, 0.1, 0.9)
    exact = reference.neighbor_weights(attention.double(), *grid, 28.0, 0.1, 0.9)
    same = (ours > 0) == (exact > 0)  # a tap within rounding of the row mean may fall either way
    assert same.double().mean() > 0.999 or tokens < 50
    torch.testing.assert_close(torch.where(same, ours.double(), exact), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, reference.neighbor_weights(attention, *grid, 28.0, 0.1, 0.9), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 2), (5, 13), *SLOW], ids=str)
@pytest.mark.parametrize("route", ["panel", "workspace", "rows of the workspace"])
def test_neighbor_weights_from_queries_and_keys(grid, route, dtype, monkeypatch):
    tokens = grid[0] * grid[1]
    if route != "panel":
        monkeypatch.setattr(kernels, "_PANEL_COLUMNS", 0)
    if route == "rows of the workspace":
        monkeypatch.setattr(kernels, "_WORKSPACE_BYTES", 4 * tokens * max(1, tokens * 2 // 5))
    queries, keys, _ = torch.randn(2, tokens + 1, 3, 3, 20).to(dtype).permute(2, 0, 3, 1, 4)[:, :, :, 1:]
    ours = kernels.neighbor_weights_qk(queries, keys, *grid, 0.25, 28.0, 0.1, 0.9)
    exact = reference.neighbor_weights_qk(queries.double(), keys.double(), *grid, 0.25, 28.0, 0.1, 0.9)
    same = (ours > 0) == (exact > 0)  # a tap within rounding of the row mean may fall either way
    assert same.double().mean() > 0.999
    torch.testing.assert_close(torch.where(same, ours.double(), exact), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [0, 1024])
def test_not_a_number_in_queries_or_keys_stays(columns, monkeypatch):
    monkeypatch.setattr(kernels, "_PANEL_COLUMNS", columns)
    queries, keys = torch.randn(2, 1, 2, 12, 16)
    queries[0, 1, 7, 3] = torch.inf
    ours = kernels.neighbor_weights_qk(queries, keys, 3, 4, 0.25, 28.0, 0.1, 0.9)
    inside = reference.neighbor_table(3, 4, queries.device)[1]
    assert ours[0, 7][inside[7]].isnan().all() and ours[0, :7].isfinite().all() and ours[0, 8:].isfinite().all()
    keys[0, 0, 2, 5] = torch.nan
    assert kernels.neighbor_weights_qk(queries, keys, 3, 4, 0.25, 28.0, 0.1, 0.9)[0][inside].isnan().all()


def test_rows_too_long_for_the_registers_are_refused():
    tokens = kernels._LONGEST_ROW + 1
    with pytest.raises(ValueError, match="queries: the triton backend takes at most 32768 tokens"):
        kernels.neighbor_weights_qk(*torch.empty(2, 1, 1, tokens, 1), 1, tokens, 1.0, 28.0, 0.1, 0.9)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (0.25, 0.31)])
def test_quantiles_are_exact_order_statistics(low, high):
    attention = torch.randint(-3, 4, (2, 30, 30)).float() + 0.25 * torch.randn(2, 30, 1)
    attention[:, 4] = -attention[:, 4].abs()
    ours = kernels.neighbor_weights(attention, 5, 6, 28.0, low, high)
    torch.testing.assert_close(ours, reference.neighbor_weights(attention, 5, 6, 28.0, low, high), rtol=1e-5, atol=1e-6)


def test_minus_infinity_is_an_attention_of_zero_and_nan_stays():
    attention = torch.randn(1, 2, 12, 12)
    attention[0, 0, 5, 2:9] = -torch.inf
    ours = kernels.neighbor_weights(attention, 3, 4, 28.0, 0.1, 0.9)
    torch.testing.assert_close(ours, reference.neighbor_weights(attention, 3, 4, 28.0, 0.1, 0.9), rtol=1e-5, atol=1e-6)
    attention[0, 1, 7, 0] = torch.nan
    ours = kernels.neighbor_weights(attention, 3, 4, 28.0, 0.1, 0.9)
    assert ours[0, 7].isnan().any() and ours[0, :7].isfinite().all()


@pytest.mark.parametrize(
    "grid, width", [((1, 1), 16), ((1, 2), 48), ((7, 9), 384), ((3, 5), 512), ((3, 7), 520)], ids=str
)
def test_mix_and_gradient(grid, width, dtype):
    tokens = grid[0] * grid[1]
    code, grad_out = torch.randn(2, 2, tokens, width).to(dtype)
    weights = torch.randn(2, tokens, 9)
    unit = torch.finfo(dtype).eps
    ours = [kernels.neighbor_mix(code, weights, *grid)]
    exact = [reference.neighbor_mix(code.double(), weights.double(), *grid)]
    ours += kernels.neighbor_mix_grad(grad_out, code, weights, *grid, True, True)
    exact += reference.neighbor_mix_grad(grad_out.double(), code.double(), weights.double(), *grid, True, True)
    for a, b, eps in zip(ours, exact, (unit, unit, 1.2e-7), strict=True):
        assert (a - b).norm() <= 2 * eps * b.norm()
    nothing = kernels.neighbor_mix_grad(grad_out, code, weights, *grid, False, False)
    assert [g.numel() for g in nothing] == [0, 0]
