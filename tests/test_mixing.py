"""local_mix, neighbor_weights, neighbor_weights_qk, neighbor_mix: golden numbers, an oracle, gradients, odd input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hpkernels as hk
from tests.ops.local_mix.dense import published_bound

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["local_mix_a", "local_mix_b"])
def test_golden(name, backend, device):
    data = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    skip = meta["prefix_tokens"]
    tensors = {k: torch.from_numpy(data[k]).to(device) for k in data.files if data[k].ndim}
    attention = tensors["attention"][:, :, skip:, skip:]
    code = tensors["code"].requires_grad_()
    mixed = hk.local_mix(code, attention, meta["grid"], sigma=meta["sigma"], backend=backend)
    bound = published_bound(device.type)
    assert (mixed - tensors["local_code"]).abs().max() <= bound * tensors["local_code"].abs().max()
    mixed.backward(tensors["grad_out"])
    assert (code.grad - tensors["grad_code"]).abs().max() <= bound * tensors["grad_code"].abs().max()


@pytest.mark.parametrize("name", ["local_mix_a", "local_mix_b"])
def test_golden_from_queries_and_keys(name, backend, device):
    """Logits as queries and unit vectors as keys: the products are the logits, exactly."""
    data = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    skip = meta["prefix_tokens"]
    tensors = {k: torch.from_numpy(data[k]).to(device) for k in data.files if data[k].ndim}
    queries = tensors["attention"][:, :, skip:, skip:]
    keys = torch.eye(queries.shape[-1], device=device).expand_as(queries)
    options = dict(scale=1.0, sigma=meta["sigma"], backend=backend)
    weights = hk.neighbor_weights_qk(queries, keys, meta["grid"], **options)
    rows = tensors["code"].flatten(2).transpose(1, 2)
    mixed = hk.neighbor_mix(rows, weights, meta["grid"], backend=backend).transpose(1, 2).reshape(tensors["code"].shape)
    bound = published_bound(device.type)
    assert (mixed - tensors["local_code"]).abs().max() <= bound * tensors["local_code"].abs().max()
    one_head = hk.neighbor_weights_qk(queries.mean(1, keepdim=True), keys[:, :1], meta["grid"], **options)
    assert torch.equal(
        one_head, hk.neighbor_weights(queries.mean(1), meta["grid"], sigma=meta["sigma"], backend=backend)
    )


def oracle_weights(attention: np.ndarray, height: int, width: int, sigma=28.0, low=0.1, high=0.9) -> np.ndarray:
    a = attention.astype(np.float64)
    a = a.mean(1) if a.ndim == 4 else a
    batch, tokens = a.shape[0], height * width
    c = np.clip(a, np.quantile(a, low, axis=2, keepdims=True), np.quantile(a, high, axis=2, keepdims=True))
    p = np.exp(c - c.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    out = np.zeros((batch, tokens, 9))
    for y in range(height):
        for x in range(width):
            inside = [
                (dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if 0 <= y + dy < height and 0 <= x + dx < width
            ]
            for dy, dx in inside:
                taps = p[:, y * width + x, (y + dy) * width + x + dx]
                out[:, y * width + x, 3 * dy + dx + 4] = np.where(taps >= 1 / tokens, sigma * taps / len(inside), 0)
    return out


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 2), (7, 7), (5, 13), (28, 28)])
@pytest.mark.parametrize("heads", [None, 1, 6])
def test_weights_equal_oracle(grid, heads, backend, device):
    tokens = grid[0] * grid[1]
    shape = (2, tokens, tokens) if heads is None else (2, heads, tokens, tokens)
    dtype = torch.float32 if backend == "triton" else torch.float64
    attention = 3 * torch.randn(shape, device=device, dtype=dtype)
    weights = hk.neighbor_weights(attention, grid, sigma=5.0, low_quantile=0.2, high_quantile=0.85, backend=backend)
    expected = oracle_weights(attention.cpu().numpy(), *grid, 5.0, 0.2, 0.85)
    got = weights.double().cpu().numpy()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    disagree = np.abs(got - expected) > tolerance * 5.0
    if grid == (1, 1):  # one token: p = 1 = 1/T exactly, a tie of rounding
        return
    assert disagree.mean() <= (0 if dtype == torch.float64 else 1e-3)


def projection(batch: int, heads: int, tokens: int, depth: int, dtype: torch.dtype, device) -> torch.Tensor:
    """Queries, keys and values (3, B, heads, T, d) as a ViT makes them: views of one projection without its prefix."""
    qkv = torch.randn(batch, tokens + 2, 3, heads, depth, device=device, dtype=torch.float64).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4)[:, :, :, 2:]


@pytest.mark.parametrize("grid", [(1, 7), (3, 2), (7, 7), (5, 13), (28, 28)])
@pytest.mark.parametrize("heads, depth", [(1, 5), (6, 64)])
def test_weights_from_queries_and_keys_equal_oracle(grid, heads, depth, backend, device):
    dtype = torch.float32 if backend == "triton" else torch.float64
    queries, keys, _ = projection(2, heads, grid[0] * grid[1], depth, dtype, device)
    options = dict(sigma=5.0, low_quantile=0.2, high_quantile=0.85)
    weights = hk.neighbor_weights_qk(queries, keys, grid, backend=backend, **options)
    logits = np.einsum("bhid,bhjd->bhij", queries.double().cpu(), keys.double().cpu()) * depth**-0.5
    disagree = np.abs(weights.double().cpu().numpy() - oracle_weights(logits, *grid, *options.values()))
    assert weights.dtype == dtype
    within, share = (1e-11, 0) if dtype == torch.float64 else (1e-5, 1e-3)
    assert (disagree > within * 5.0).mean() <= share


def test_queries_and_keys_of_any_layout_and_dtype(backend, device):
    queries, keys, _ = projection(2, 3, 20, 8, torch.float32, device)
    expected = hk.neighbor_weights_qk(queries.contiguous(), keys.contiguous(), (4, 5), backend=backend)
    assert torch.equal(hk.neighbor_weights_qk(queries, keys, (4, 5), backend=backend), expected)
    columns = queries.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(hk.neighbor_weights_qk(columns, keys, (4, 5), backend=backend), expected)
    for a in (torch.float16, torch.bfloat16, torch.float32):
        promoted = hk.neighbor_weights_qk(queries.to(a).float(), keys.half().float(), (4, 5), backend=backend)
        mixed = hk.neighbor_weights_qk(queries.to(a), keys.half(), (4, 5), backend=backend)
        torch.testing.assert_close(mixed, promoted, rtol=1e-5, atol=1e-6)
    assert hk.neighbor_weights_qk(queries[:0], keys[:0], (4, 5), backend=backend).shape == (0, 20, 9)


def test_scale_is_that_of_the_logits(backend, device):
    queries, keys, _ = projection(1, 2, 12, 16, torch.float32, device)
    default = hk.neighbor_weights_qk(queries, keys, (3, 4), backend=backend)
    assert torch.equal(default, hk.neighbor_weights_qk(queries, keys, (3, 4), scale=0.25, backend=backend))
    doubled = hk.neighbor_weights_qk(2 * queries, keys, (3, 4), scale=0.125, backend=backend)
    assert torch.equal(default, doubled)  # powers of two: exact


def test_local_mix_of_queries_and_keys(backend, device):
    queries, keys, _ = projection(2, 3, 20, 8, torch.float32, device)
    code = torch.randn(2, 20, 7, device=device, requires_grad=True)
    mixed = hk.local_mix(code, (queries, keys), (4, 5), sigma=3.0, backend=backend)
    weights = hk.neighbor_weights_qk(queries, keys, (4, 5), sigma=3.0, backend=backend)
    assert torch.equal(mixed, hk.neighbor_mix(code, weights, (4, 5), backend=backend))
    mixed.sum().backward()
    assert code.grad.isfinite().all() and queries.grad is None


def test_a_constant_per_row_and_a_logarithm_change_nothing(backend, device):
    attention = torch.randn(2, 3, 25, 25, device=device)
    base = hk.neighbor_weights(attention, (5, 5), backend=backend)
    shifted = hk.neighbor_weights(attention + torch.randn(2, 3, 25, 1, device=device), (5, 5), backend=backend)
    logged = hk.neighbor_weights(attention.softmax(-1).log(), (5, 5), backend=backend)
    torch.testing.assert_close(shifted, base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logged, base, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_attention_that_underflowed_to_zero(share, backend, device):
    """log of a 16-bit softmax holds -inf: an attention of zero, never NaN."""
    attention = torch.randn(2, 2, 25, 25, device=device)
    attention[torch.rand_like(attention) < share] = -torch.inf
    weights = hk.neighbor_weights(attention, (5, 5), backend=backend)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights, hk.neighbor_weights(attention.clamp_min(-1e30), (5, 5), backend=backend))


def test_logits_that_overflow(backend, device):
    """An error on the CPU and NaN on a GPU, never weights that look like any others."""
    queries, keys = torch.randn(2, 1, 2, 12, 8, device=device)
    attention = torch.randn(1, 2, 12, 12, device=device)
    queries[:, :, 5] *= 1e20
    keys *= 1e20
    attention[:, :, 5, 3:] = torch.finfo(torch.float32).max
    calls = {
        "queries": lambda: hk.neighbor_weights_qk(queries, keys, (3, 4), backend=backend),
        "attention": lambda: hk.neighbor_weights(attention, (3, 4), backend=backend),
    }
    for name, call in calls.items():
        if device.type == "cpu":
            with pytest.raises(ValueError, match=f"^{name}: .* finite .* for 1 tokens"):
                call()
        else:
            nan = call().isnan().any(-1)
            assert nan[:, 5].all() and nan.sum() == 1


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4)])
def test_mix_gradcheck(grid, backend, device):
    if device.type == "cuda":
        pytest.skip("fp64 runs on reference and cpu only")
    tokens = grid[0] * grid[1]
    code = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, tokens, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, w: hk.neighbor_mix(c, w, grid, backend=backend), (code, weights))


def test_mix_equals_unfold(backend, device):
    code, weights = torch.randn(2, 20, 7, device=device), torch.rand(2, 20, 9, device=device)
    image = code.transpose(1, 2).reshape(2, 7, 4, 5)
    taps = torch.nn.functional.unfold(image, 3, padding=1).view(2, 7, 9, 20)
    expected = (taps * weights.permute(0, 2, 1)[:, None]).sum(2).transpose(1, 2)
    torch.testing.assert_close(hk.neighbor_mix(code, weights, (4, 5), backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit(dtype, backend, device):
    code, attention = torch.randn(2, 16, 8, device=device).to(dtype), torch.randn(2, 3, 16, 16, device=device).to(dtype)
    mixed = hk.local_mix(code, attention, (4, 4), backend=backend)
    exact = hk.local_mix(code.double(), attention.double(), (4, 4), backend="reference")
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_both_layouts_of_the_code(backend, device):
    code, attention = torch.randn(2, 6, 4, 5, device=device), torch.randn(2, 20, 20, device=device)
    image = hk.local_mix(code, attention, (4, 5), backend=backend)
    rows = hk.local_mix(code.flatten(2).transpose(1, 2), attention, (4, 5), backend=backend)
    assert torch.equal(image.flatten(2).transpose(1, 2), rows) and image.shape == code.shape


def test_autocast_does_not_show_in_weights_of_queries_and_keys(backend, device):
    queries, keys = torch.randn(2, 2, 3, 12, 8, device=device)
    expected = hk.neighbor_weights_qk(queries, keys, (3, 4), backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(hk.neighbor_weights_qk(queries, keys, (3, 4), backend=backend), expected)
