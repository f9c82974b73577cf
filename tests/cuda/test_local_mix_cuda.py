"""The CUDA kernels of local mixing on the host, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.local_mix import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRIDS = [(1, 1), (1, 2), (3, 4), (4, 6), (5, 13), (8, 9)]  # rows at 16, at 8 and at fewer bytes


def assert_weights(ours: torch.Tensor, logits: torch.Tensor, grid: tuple[int, int], low: float, high: float) -> None:
    """Against the published steps on the whole matrix in fp64: a tap is kept where its softmax is not below the row's
    mean 1/T. Within 1e-5 of it either is right, and so is nothing else."""
    logits = logits.double().clamp_min(-1e30)
    logits = logits.mean(1) if logits.ndim == 4 else logits
    bounds = [logits.quantile(q, -1, keepdim=True) for q in (low, high)]
    p = torch.softmax(torch.minimum(torch.maximum(logits, bounds[0]), bounds[1]), -1)
    index, inside = reference.neighbor_table(*grid, logits.device)
    above_mean = p.gather(2, index.expand(len(p), -1, -1)) * p.shape[2] - 1
    kept = 28 * (above_mean + 1) / p.shape[2] / inside.sum(1, keepdim=True)
    near = (ours - kept).abs() <= 1e-5 * kept
    right = torch.where(above_mean > 1e-5, near, torch.where(above_mean < -1e-5, ours == 0, near | (ours == 0)))
    assert ours.dtype == torch.float32 and torch.where(inside, right, ours == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights(local_mix, grid, heads, dtype):
    tokens = grid[0] * grid[1]
    attention = torch.randn(*((2, tokens) if heads is None else (2, heads, tokens)), tokens).to(dtype)
    ours = local_mix.neighbor_weights(attention, *grid, 28.0, 0.1, 0.9)
    assert_weights(ours, attention, grid, 0.1, 0.9)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (0.25, 0.31), (0.1, 0.9)])
def test_quantiles_are_exact_order_statistics(local_mix, low, high):
    """Ties, constants, outliers that leave one interval for the rest, tiny and huge ranges."""
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
    rows[0, 10:20] = torch.randint(-3, 4, (10, 100)).float()
    ours = local_mix.neighbor_weights(rows, 10, 10, 28.0, low, high)
    assert_weights(ours, rows, (10, 10), low, high)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_constant_rows_keep_every_tap(local_mix, quantile):
    weights = local_mix.neighbor_weights(torch.randn(1, 48, 48), 6, 8, 28.0, quantile, quantile)
    _, inside = reference.neighbor_table(6, 8, torch.device("cpu"))
    assert (weights - 28 / 48 * inside / inside.sum(1, keepdim=True)).abs().max() < 1e-6


def test_minus_infinity_is_an_attention_of_zero_and_nan_stays(local_mix):
    attention = torch.randn(1, 2, 12, 12)
    attention[0, 0, 5, 2:9] = -torch.inf
    ours = local_mix.neighbor_weights(attention, 3, 4, 28.0, 0.1, 0.9)
    assert_weights(ours, attention, (3, 4), 0.1, 0.9)
    for value in (torch.nan, torch.inf):
        attention[0, 1, 7, 0] = value
        ours = local_mix.neighbor_weights(attention, 3, 4, 28.0, 0.1, 0.9)
        assert ours[0, 7].isnan().any() and ours[0, :7].isfinite().all() and ours[0, 8:].isfinite().all()


def test_long_rows(local_mix):
    """1,296 tokens: a block has as many warps as find room for their rows, here four."""
    attention = torch.randn(1, 1, 1296).half().expand(1, 1296, 1296).contiguous()
    ours = local_mix.neighbor_weights(attention, 36, 36, 28.0, 0.1, 0.9)
    assert_weights(ours, attention, (36, 36), 0.1, 0.9)


def test_more_tokens_than_a_row_holds_is_an_error(local_mix):
    attention = torch.zeros(1).expand(1, 16512, 16512)
    with pytest.raises(ValueError, match="^attention: .* at most 16384 tokens an image, got 16512"):
        local_mix.neighbor_weights(attention, 128, 129, 28.0, 0.1, 0.9)


@pytest.mark.parametrize("dtype", [*DTYPES, None])
@pytest.mark.parametrize("grid, heads, depth", [((1, 1), 1, 8), ((3, 5), 3, 7), ((12, 11), 2, 64)], ids=str)
def test_weights_from_queries_and_keys(local_mix, monkeypatch, grid, heads, depth, dtype):
    """None: queries and keys of two dtypes. Workspace for one image at a time."""
    monkeypatch.setattr(local_mix, "_WORKSPACE_BYTES", 1)
    tokens = grid[0] * grid[1]
    qkv = torch.randn(2, tokens, 2, heads, depth).permute(2, 0, 3, 1, 4)
    queries, keys = qkv[0].to(dtype or torch.float16), qkv[1].to(dtype or torch.bfloat16)
    ours = local_mix.neighbor_weights_qk(queries, keys, *grid, 0.3, 28.0, 0.1, 0.9)
    logits = 0.3 * (queries.double() @ keys.double().transpose(2, 3))
    assert_weights(ours, logits, grid, 0.1, 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid, width", [((1, 1), 16), ((1, 19), 48), ((7, 9), 24), ((3, 8), 7), ((10, 3), 520)], ids=str
)
def test_mix_and_gradients(local_mix, grid, width, dtype):
    tokens = grid[0] * grid[1]
    code, grad_out = torch.randn(2, 2, tokens, width).to(dtype)
    weights = torch.randn(2, tokens, 9)
    _, inside = reference.neighbor_table(*grid, torch.device("cpu"))
    exact = [reference.neighbor_mix(code.double(), weights.double(), *grid)]
    exact += reference.neighbor_mix_grad(grad_out.double(), code.double(), weights.double(), *grid, True, True)
    weights = torch.where(inside, weights, torch.nan)  # taps off the grid are ignored
    ours = [local_mix.neighbor_mix(code, weights, *grid)]
    ours += local_mix.neighbor_mix_grad(grad_out, code, weights, *grid, True, True)
    unit = torch.finfo(dtype).eps
    for a, b, eps in zip(ours, exact, (unit, unit, 1.2e-7), strict=True):
        assert (a - b).norm() <= 2 * eps * b.norm() and a.isfinite().all()
    nothing = local_mix.neighbor_mix_grad(grad_out, code, weights, *grid, False, False)
    assert [g.numel() for g in nothing] == [0, 0]


def test_no_images(local_mix):
    queries = torch.randn(0, 2, 12, 8)
    assert local_mix.neighbor_weights_qk(queries, queries, 3, 4, 0.3, 28.0, 0.1, 0.9).shape == (0, 12, 9)


def test_operands_of_different_dtypes(local_mix):
    code, grad_out, weights = torch.randn(1, 12, 16).bfloat16(), torch.randn(1, 12, 16), torch.randn(1, 12, 9).half()
    ours = local_mix.neighbor_mix_grad(grad_out, code, weights, 3, 4, True, True)
    exact = reference.neighbor_mix_grad(grad_out.double(), code.double(), weights.double(), 3, 4, True, True)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float16
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= torch.finfo(a.dtype).eps * b.norm()
