"""Neighbour weights, mixing and its gradients against the published outputs and a dense form in fp64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpkernels.ops.local_mix.weighting import Weighting
from tests.ops.local_mix import dense
from tests.ops.local_mix.dense import check_weights

OP = "local_mix"
GOLDEN = Path(__file__).resolve().parents[2] / "golden"
HEADS = (None, 3)


def with_heads(*grids):
    return [(grid, heads) for grid in grids for heads in HEADS]


@pytest.mark.only("reference", "cpu", "cuda", "gpu-triton")  # half a minute under the interpreter
@pytest.mark.parametrize("name", ["local_mix_a", "local_mix_b"])
def test_published_outputs(kernels, way, name):
    data = np.load(GOLDEN / f"{name}.npz")
    attention, code, expected, grad_out, expected_grad = (
        torch.from_numpy(data[k]) for k in ("attention", "code", "local_code", "grad_out", "grad_code")
    )
    grid = code.shape[2:]
    weights = kernels.neighbor_weights(attention[:, :, 1:, 1:], Weighting(*grid, 28.0, 0.1, 0.9))
    rows = code.flatten(2).transpose(1, 2)
    mixed = kernels.neighbor_mix(rows, weights, *grid)
    bound = dense.published_bound(way.device)
    assert (mixed.transpose(1, 2).reshape(code.shape) - expected).abs().max() <= bound * expected.abs().max()
    g = grad_out.flatten(2).transpose(1, 2)
    grad, none = kernels.neighbor_mix_grad(g, rows, weights, *grid, True, False)
    assert (grad.transpose(1, 2).reshape(code.shape) - expected_grad).abs().max() <= bound * expected_grad.abs().max()
    assert none.numel() == 0


@pytest.mark.cases(
    "grid, heads",  # rows at 16, at 8 and at fewer bytes
    [*with_heads((1, 1), (1, 2), (5, 13)), ((1, 1), 2), ((1, 5), 1), ((2, 2), 3)],
    cpu=[*with_heads((3, 4), (4, 6), (8, 9), (14, 14)), ((7, 9), 6), ((14, 14), 2), ((28, 28), None), ((28, 28), 1)],
    cuda=with_heads((3, 4), (4, 6), (8, 9)),
    triton=[pytest.param(*c, marks=pytest.mark.slow) for c in with_heads((3, 21), (3, 43), (14, 14), (28, 28))],
)
def test_weights(kernels, way, grid, heads, dtype):
    tokens = grid[0] * grid[1]
    images = 1 if way.name == "interpreter" else 2
    attention = torch.randn(images, *(() if heads is None else (heads,)), tokens, tokens, dtype=torch.float64)
    attention = (2 * attention).to(dtype)
    weights = kernels.neighbor_weights(attention, Weighting(*grid, 28.0, 0.1, 0.9))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_weights(weights, attention, grid)


@pytest.mark.cases(
    "batch, grid, heads, depth",
    [
        (2, (1, 1), 1, 8),
        (3, (1, 1), 2, 3),
        (3, (1, 5), 1, 8),
        (2, (1, 2), 3, 20),
        (2, (3, 5), 3, 7),
    ],
    cpu=[(2, (5, 13), 3, 20), (3, (7, 9), 6, 16), (3, (14, 14), 3, 64), (70, (28, 28), 1, 20)],
    cuda=[(2, (5, 13), 3, 20), (2, (12, 11), 2, 64)],
)
def test_weights_from_queries_and_keys(kernels, batch, grid, heads, depth, dtype):
    """More images than one group of packed keys of the CPU holds at the largest shape."""
    tokens = grid[0] * grid[1]
    rows = torch.randn(batch, 1 + tokens, 3, heads, depth).to(dtype)
    queries, keys, _ = rows.permute(2, 0, 3, 1, 4)[:, :, :, 1:]
    weights = kernels.neighbor_weights_qk(queries, keys, 0.3, Weighting(*grid, 28.0, 0.1, 0.9))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for image in {0, 1, batch - 1}:
        logits = 0.3 * (queries[image].double() @ keys[image].double().transpose(1, 2))
        check_weights(weights[image, None], logits[None], grid, bound=2e-5)


@pytest.mark.cases(
    "low, high",
    [(0.0, 1.0), (0.5, 0.5), (0.1, 0.9)],
    cpu=[(0.0, 0.0), (0.25, 0.31), (0.25, 0.75), (0.1, 0.3), (0.0, 0.5)],
    cuda=[(0.0, 0.0), (0.25, 0.31), (0.25, 0.75), (0.1, 0.3), (0.0, 0.5)],
)
def test_quantiles_are_exact_order_statistics(kernels, low, high):
    """Few values, ties across the quantile, constants, outliers that leave one interval for the rest, all ranges."""
    rows = torch.randn(1, 100, 100)
    rows[0, 0] = 1.5
    rows[0, 1] = (torch.arange(100) % 2).float()
    rows[0, 2, :3] = torch.tensor([-1e30, 1e30, 3e37])
    rows[0, 3] = torch.exp2(torch.arange(100.0) - 60)
    rows[0, 4] = -torch.exp2(-torch.arange(100.0))
    rows[0, 5] = rows[0, 5].round()
    rows[0, 6] *= 1e-37
    rows[0, 7, ::2] = torch.tensor([-3e38, 3e38]).repeat(25)  # wider than fp32: no intervals
    rows[0, 8] *= 1e-44
    rows[0, 9] = torch.exp2(torch.arange(100.0) * 1.2 - 60)
    rows[0, 10:20] = torch.randint(-3, 4, (10, 100)).float()
    rows[0, 20:30] = torch.randint(-3, 4, (10, 100)).float() + 0.25 * torch.randn(10, 1)
    rows[0, 30] = -rows[0, 30].abs()
    check_weights(kernels.neighbor_weights(rows, Weighting(10, 10, 28.0, low, high)), rows, (10, 10), low, high)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_constant_rows_keep_every_tap(kernels, quantile):
    weights = kernels.neighbor_weights(torch.randn(1, 48, 48), Weighting(6, 8, 28.0, quantile, quantile))
    inside = dense.neighbors(6, 8)[1]
    assert (weights - 28 / 48 * inside / inside.sum(1, keepdim=True)).abs().max() < 1e-6


@pytest.mark.cases("grid", [(3, 4)], cpu=[(7, 7)])
def test_minus_infinity_is_an_attention_of_zero(kernels, grid):
    tokens = grid[0] * grid[1]
    attention = torch.randn(1, 2, tokens, tokens)
    attention[0, 0, 5, 2:9] = -torch.inf
    attention[0, :, 6, ::3] = -torch.inf
    weights = kernels.neighbor_weights(attention, Weighting(*grid, 28.0, 0.1, 0.9))
    check_weights(weights, attention, grid)
    assert torch.equal(weights, kernels.neighbor_weights(attention.clamp_min(-1e30), Weighting(*grid, 28.0, 0.1, 0.9)))
    index, inside = dense.neighbors(*grid)
    assert not weights[0, 6][inside[6] & (index[6] % 3 == 0)].any()


@pytest.mark.only("reference", "cuda", "triton")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_stays_in_its_row(kernels, value):
    """Where nothing can be raised, and where the op looks at numbers first."""
    attention = torch.randn(1, 2, 12, 12)
    attention[0, 1, 7, 0] = value
    weights = kernels.neighbor_weights(attention, Weighting(3, 4, 28.0, 0.1, 0.9))
    assert weights[0, 7].isnan().any() and weights[0, :7].isfinite().all() and weights[0, 8:].isfinite().all()


@pytest.mark.cases(
    "grid, width",
    [((1, 1), 1), ((1, 1), 16), ((1, 2), 48), ((1, 7), 16), ((3, 2), 48), ((7, 9), 24), ((3, 8), 7), ((5, 5), 520)],
    cpu=[((9, 7), 130)],
    cuda=[((1, 19), 48), ((10, 3), 520)],
    triton=[((7, 9), 384), ((3, 5), 512), ((3, 7), 520)],
)
def test_mix_and_gradients(kernels, way, grid, width, dtype):
    tokens = grid[0] * grid[1]
    working = torch.float64 if dtype == torch.float64 else torch.float32
    code, grad_out = torch.randn(2, 2, tokens, width, dtype=working).to(dtype)
    weights = torch.randn(2, tokens, 9, dtype=working)
    leaves = [t.double().requires_grad_() for t in (code, weights)]
    exact = dense.mix(*leaves, *grid)
    exact.backward(grad_out.double())
    if way.backend != "reference":  # the kernels ignore taps off the grid
        weights = torch.where(dense.neighbors(*grid)[1], weights, torch.nan)
    mixed = kernels.neighbor_mix(code, weights, *grid)
    grads = kernels.neighbor_mix_grad(grad_out, code, weights, *grid, True, True)
    for ours, oracle in zip((mixed, *grads), (exact, *(leaf.grad for leaf in leaves)), strict=True):
        eps, difference = torch.finfo(ours.dtype).eps, ours - oracle
        largest = {torch.float32: 1e-6, torch.float64: 1e-12}.get(ours.dtype, eps)
        assert ours.isfinite().all() and difference.abs().max() <= largest * oracle.abs().max()
        assert difference.norm() <= 2 * eps * oracle.norm() or ours.dtype == torch.float64
    assert mixed.dtype == grads[0].dtype == dtype and grads[1].dtype == working
    only_weights = kernels.neighbor_mix_grad(grad_out, code, weights, *grid, False, True)
    assert only_weights[0].numel() == 0 and torch.equal(only_weights[1], grads[1])
    nothing = kernels.neighbor_mix_grad(grad_out, code, weights, *grid, False, False)
    assert [g.numel() for g in nothing] == [0, 0]


def test_operands_of_different_dtypes(kernels):
    code, grad_out, weights = torch.randn(1, 12, 16).bfloat16(), torch.randn(1, 12, 16), torch.randn(1, 12, 9).half()
    ours = kernels.neighbor_mix_grad(grad_out, code, weights, 3, 4, True, True)
    leaves = [t.double().requires_grad_() for t in (code, weights)]
    dense.mix(*leaves, 3, 4).backward(grad_out.double())
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float16
    for a, leaf in zip(ours, leaves, strict=True):
        assert (a - leaf.grad).norm() <= torch.finfo(a.dtype).eps * leaf.grad.norm()


@pytest.mark.cases("dtype", [torch.float16], reference=[torch.bfloat16], cpu=[torch.bfloat16], cuda=[torch.bfloat16])
def test_strided_code(kernels, dtype):
    code, weights = torch.randn(2, 8, 12).to(dtype).transpose(1, 2), torch.randn(2, 12, 9)
    out = kernels.neighbor_mix(code, weights, 3, 4)
    assert out.dtype == dtype
    expected = dense.mix(code.double(), weights.double(), 3, 4)
    assert (out - expected).abs().max() <= torch.finfo(dtype).eps / 2 * expected.abs().max()


def test_no_images(kernels):
    queries = torch.randn(0, 2, 12, 8)
    assert kernels.neighbor_weights_qk(queries, queries, 0.3, Weighting(3, 4, 28.0, 0.1, 0.9)).shape == (0, 12, 9)


@pytest.mark.only("cpu")
def test_thread_counts_agree_bitwise(kernels, same_for_all_threads):
    attention, code = torch.randn(2, 3, 63, 63), torch.randn(2, 63, 100)
    queries, keys = torch.randn(2, 2, 3, 63, 16)

    def run():
        weights = kernels.neighbor_weights(attention, Weighting(7, 9, 28.0, 0.1, 0.9))
        from_rows = kernels.neighbor_weights_qk(queries, keys, 0.25, Weighting(7, 9, 28.0, 0.1, 0.9))
        mixed = kernels.neighbor_mix(code, weights, 7, 9)
        return weights, from_rows, mixed, *kernels.neighbor_mix_grad(mixed, code, weights, 7, 9, True, True)

    same_for_all_threads(run)
