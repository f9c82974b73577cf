"""Neighbour weights and mixing on the CPU against the published outputs and a direct dense form in fp64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hpkernels import _cpu
from hpkernels.ops.local_mix import cpu as native

GOLDEN = Path(__file__).parent.parent / "golden"


def dense_weights(attention, height, width, sigma, low, high):
    """The published steps on the full (B, T, T) matrix, in fp64."""
    a = attention.double()
    a = a.mean(1) if a.ndim == 4 else a
    clamp = [torch.quantile(a, q, dim=-1, keepdim=True) for q in (low, high)]
    p = torch.softmax(torch.minimum(torch.maximum(a, clamp[0]), clamp[1]), -1)
    w = torch.where(p >= p.mean(-1, keepdim=True), sigma * p, 0.0)
    index, inside = neighbors(height, width)
    return w.gather(2, index.expand(w.shape[0], -1, -1)) * inside / inside.sum(1, keepdim=True)


def neighbors(height, width):
    """Index (T, 9) of each token's neighbours (0 off the grid), and whether they lie on the grid."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    yy = torch.stack([y + dy for dy in (-1, 0, 1) for _ in range(3)], -1).reshape(-1, 9)
    xx = torch.stack([x + dx for _ in range(3) for dx in (-1, 0, 1)], -1).reshape(-1, 9)
    inside = (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
    return torch.where(inside, yy * width + xx, 0), inside


def dense_mix(code, weights, height, width):
    index, inside = neighbors(height, width)
    return torch.einsum("btn,btnd->btd", weights * inside, code[:, index])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ["local_mix_a", "local_mix_b"])
def test_published_outputs(isa, name):
    data = np.load(GOLDEN / f"{name}.npz")
    attention, code, expected, grad_out, expected_grad = (
        torch.from_numpy(data[k]) for k in ("attention", "code", "local_code", "grad_out", "grad_code")
    )
    height, width = code.shape[2:]
    weights = native.neighbor_weights(attention[:, :, 1:, 1:], height, width, 28.0, 0.1, 0.9)
    rows = code.flatten(2).transpose(1, 2)
    mixed = native.neighbor_mix(rows, weights, height, width)
    assert (mixed.transpose(1, 2).reshape(code.shape) - expected).abs().max() <= 1e-6 * expected.abs().max()
    g = grad_out.flatten(2).transpose(1, 2)
    grad, none = native.neighbor_mix_grad(g, rows, weights, height, width, True, False)
    assert (grad.transpose(1, 2).reshape(code.shape) - expected_grad).abs().max() <= 1e-6 * expected_grad.abs().max()
    assert none.numel() == 0


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.float16, 2e-6)])
@pytest.mark.parametrize("height, width, heads", [(1, 1, 2), (1, 5, 1), (2, 2, 3), (7, 9, 6), (14, 14, 2), (28, 28, 1)])
def test_weights(isa, height, width, heads, dtype, bound):
    tokens = height * width
    attention = (2 * random(2, heads, tokens, tokens, seed=tokens)).to(dtype)
    for case in (attention, attention[:, 0]):
        expected = dense_weights(case, height, width, 28.0, 0.1, 0.9)
        weights = native.neighbor_weights(case, height, width, 28.0, 0.1, 0.9)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (weights - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-5)])
@pytest.mark.parametrize(
    "height, width, heads, depth", [(1, 1, 2, 3), (1, 5, 1, 8), (7, 9, 6, 16), (14, 14, 3, 64), (28, 28, 1, 20)]
)
def test_weights_from_queries_and_keys(isa, height, width, heads, depth, dtype, bound):
    """More images than one group of packed keys holds at the largest shape; scratch full of NaN."""
    tokens, batch = height * width, 3 if height < 28 else 70
    rows = random(batch, 1 + tokens, 3, heads, depth, seed=tokens).to(dtype)
    queries, keys, _ = rows.permute(2, 0, 3, 1, 4)[:, :, :, 1:]
    _cpu.poison_memory(True)
    weights = native.neighbor_weights_qk(queries, keys, height, width, 0.3, 28.0, 0.1, 0.9)
    _cpu.poison_memory(False)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for image in {0, batch - 1}:
        logits = 0.3 * (queries[image].double() @ keys[image].double().transpose(1, 2))
        expected = dense_weights(logits[None], height, width, 28.0, 0.1, 0.9)[0]
        same = (weights[image] > 0) == (expected > 0)  # a tap within rounding of the row mean may fall either way
        assert same.all() or (dtype != torch.float64 and same.double().mean() > 0.999)
        assert ((weights[image] - expected).abs() * same).max() <= bound * expected.abs().max()


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.25, 0.75), (0.1, 0.3), (0.0, 0.5)])
def test_quantiles_of_awkward_rows(isa, low, high):
    """Few values, outliers that fill one bucket, ties across the quantile, constants, tiny and huge ranges."""
    height, width = 6, 8
    rows = random(1, 48, 48, seed=3, dtype=torch.float32)
    rows[0, 0] = 1.5
    rows[0, 1] = (torch.arange(48) % 2).float()
    rows[0, 2, :3] = torch.tensor([-1e30, 1e30, 3e37])
    rows[0, 3] = torch.exp2(torch.arange(48.0) * 2 - 60)
    rows[0, 4] = -torch.exp2(-torch.arange(48.0))
    rows[0, 5] = rows[0, 5].round()
    rows[0, 6] = 1e-37 * rows[0, 6]
    weights = native.neighbor_weights(rows, height, width, 1.0, low, high)
    expected = dense_weights(rows, height, width, 1.0, low, high)
    keep = (weights > 0) == (expected > 0)  # constant rows and ties at the mean may round either way
    assert keep.float().mean() > 0.95
    assert ((weights - expected) * keep).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_constant_rows_keep_every_tap(quantile):
    rows = random(1, 48, 48, dtype=torch.float32)
    weights = native.neighbor_weights(rows, 6, 8, 28.0, quantile, quantile)
    inside = neighbors(6, 8)[1]
    assert (weights - 28 / 48 * inside / inside.sum(1, keepdim=True)).abs().max() < 1e-6


def test_zero_attention_counts_as_minus_infinity():
    attention = random(1, 49, 49, dtype=torch.float32)
    attention[0, :, ::3] = -torch.inf
    weights = native.neighbor_weights(attention, 7, 7, 28.0, 0.1, 0.9)
    assert weights.isfinite().all()
    assert torch.equal(weights, native.neighbor_weights(attention.clamp_min(-1e30), 7, 7, 28.0, 0.1, 0.9))
    index, inside = neighbors(7, 7)
    assert not weights[0][inside & (index % 3 == 0)].any()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("height, width, depth", [(1, 1, 1), (1, 7, 16), (3, 2, 48), (9, 7, 130), (5, 5, 520)])
def test_mix_and_gradients(isa, height, width, depth, dtype, bound):
    tokens = height * width
    code, weights, g = (
        random(*shape, seed=seed, dtype=dtype).requires_grad_(seed < 2)
        for seed, shape in enumerate([(2, tokens, depth), (2, tokens, 9), (2, tokens, depth)])
    )
    oracle = [t.detach().double().requires_grad_() for t in (code, weights)]
    expected = dense_mix(*oracle, height, width)
    expected.backward(g.double())
    with torch.no_grad():
        out = native.neighbor_mix(code, weights, height, width)
        grads = native.neighbor_mix_grad(g, code, weights, height, width, True, True)
        only_weights = native.neighbor_mix_grad(g, code, weights, height, width, False, True)
    assert (out - expected).abs().max() <= bound * expected.abs().max()
    for grad, reference in zip(grads, (o.grad for o in oracle)):
        assert grad.dtype == dtype
        assert (grad - reference).abs().max() <= bound * reference.abs().max()
    assert only_weights[0].numel() == 0 and torch.equal(only_weights[1], grads[1])


def test_mixed_dtypes_and_strides():
    code, weights = random(2, 8, 12, dtype=torch.bfloat16).transpose(1, 2), random(2, 12, 9, dtype=torch.float32)
    out = native.neighbor_mix(code, weights, 3, 4)
    assert out.dtype == torch.bfloat16
    expected = dense_mix(code.double(), weights.double(), 3, 4)
    assert (out - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_thread_counts_agree_bitwise():
    attention, code = random(2, 3, 63, 63, dtype=torch.float32), random(2, 63, 100, dtype=torch.float32)
    queries, keys = random(2, 2, 3, 63, 16, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weights = native.neighbor_weights(attention, 7, 9, 28.0, 0.1, 0.9)
        from_rows = native.neighbor_weights_qk(queries, keys, 7, 9, 0.25, 28.0, 0.1, 0.9)
        mixed = native.neighbor_mix(code, weights, 7, 9)
        results.append([weights, from_rows, mixed, *native.neighbor_mix_grad(mixed, code, weights, 7, 9, True, True)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
