"""neighbor_attention: its definition in fp64 numpy, gradients, 16-bit operands, small sigmas, edges and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import hpkernels as hk


def by_definition(q, k, v, p, c, position_sigma, appearance_sigma, scale=None):
    """(B, N, .) arrays; p or c None leaves the term out."""
    q, k, v, p, c = (None if x is None else x.detach().double().cpu().numpy() for x in (q, k, v, p, c))
    result = np.empty_like(v)
    for b in range(len(q)):
        for i in range(q.shape[1]):
            exponents = k[b] @ q[b, i] * (q.shape[2] ** -0.5 if scale is None else scale)
            for places, sigma in ((p, position_sigma), (c, appearance_sigma)):
                if places is not None:
                    exponents = exponents - ((places[b] - places[b, i]) ** 2).sum(1) / (2 * sigma**2)
            weights = np.exp(exponents - exponents.max())
            result[b, i] = weights @ v[b] / weights.sum()
    return result


def tokens(device, images=2, grid=(6, 7), d=16, d_v=20, dtype=torch.float32):
    """Queries, keys, values, positions in [0, 1], colours in [0, 1]."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = torch.stack([y, x], -1).flatten(0, 1) / max(grid)
    colours = torch.rand(images, rows * columns, 3)
    made = (*(torch.randn(images, rows * columns, n).to(dtype) for n in (d, d, d_v)), positions, colours)
    return tuple(x.to(device) for x in made)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
@pytest.mark.parametrize("terms", ["both", "positions", "appearance", "neither"])
def test_equals_the_definition(terms, sigma, backend, device):
    q, k, v, p, c = tokens(device)
    p = p if terms in ("both", "positions") else None
    c = c if terms in ("both", "appearance") else None
    options = dict(position_sigma=sigma, appearance_sigma=sigma / 2)
    found = hk.neighbor_attention(q, k, v, p, c, **options, backend=backend)
    expected = by_definition(q, k, v, p if p is None else p.expand(2, -1, -1), c, **options)
    assert found.shape == v.shape and found.dtype == torch.float32
    # Exponents are differences of terms up to (0.5 / sigma)^2 in fp32: 6e-8 of that, relative, in a weight.
    assert np.abs(found.cpu().numpy() - expected).max() <= 2e-6 + 6e-8 * (1 / (sigma / 2)) ** 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands_cost_only_their_own_rounding(dtype, backend, device):
    """With sigma 0.05 the columns reach 10 and their products 100: in bf16 exponents would be off by 0.4."""
    q, k, v, p, c = tokens(device, grid=(10, 10), dtype=dtype)
    found = hk.neighbor_attention(q, k, v, p, c, position_sigma=0.05, backend=backend)
    expected = by_definition(q, k, v, p.expand(2, -1, -1), c, 0.05, 0.1)
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps * np.abs(expected) + 1e-5  # the result is rounded once
    assert (np.abs(found.double().cpu().numpy() - expected) <= bound).all()


def test_autocast_changes_nothing(backend, device):
    q, k, v, p, c = tokens(device)
    plain = hk.neighbor_attention(q, k, v, p, c, position_sigma=0.05, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(hk.neighbor_attention(q, k, v, p, c, position_sigma=0.05, backend=backend), plain)


def test_heads_share_positions_and_colours(backend, device):
    q, k, v, p, c = tokens(device, images=6)
    p, c = p.expand(6, -1, -1), c.view(2, 3, *c.shape[1:])[:, :1].expand(-1, 3, -1, -1).flatten(0, 1)
    expected = by_definition(q, k, v, p, c, 0.2, 0.1)
    q, k, v = (x.unflatten(0, (2, 3)) for x in (q, k, v))
    found = hk.neighbor_attention(q, k, v, p[0], c[::3], backend=backend)
    assert found.shape == v.shape
    assert np.abs(found.flatten(0, 1).cpu().numpy() - expected).max() <= 1e-5


def test_a_shift_changes_nothing(backend, device):
    """Positions in pixels of a large picture, colours about 200: only differences count."""
    q, k, v, p, c = tokens(device)
    p, c = (p * 64).round() / 64, (c * 64).round() / 64  # so that the shifts are exact
    plain = hk.neighbor_attention(q, k, v, p, c, position_sigma=0.05, backend=backend)
    shifted = hk.neighbor_attention(q, k, v, p + 1000, c + 200, position_sigma=0.05, backend=backend)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-5)


def test_gradients_by_differences(backend, device):
    if backend == "triton":
        pytest.skip("it takes no float64")
    q, k, v, p, c = (x.double()[:, :5] if x.ndim == 3 else x.double()[:5] for x in tokens(device, d=3, d_v=4))
    sigmas = torch.tensor([0.3, 0.4], dtype=torch.float64, device=device)

    def attend(q, k, v, p, c, s, t):
        return hk.neighbor_attention(q, k, v, p, c, position_sigma=s, appearance_sigma=t, backend=backend)

    inputs = tuple(x.clone().requires_grad_() for x in (q, k, v, p, c, *sigmas))
    assert torch.autograd.gradcheck(attend, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_at_a_small_sigma(dtype, backend, device):
    """fp32 gradients against fp64 ones at sigma 0.05, also where the operands are bf16."""
    q, k, v, p, c = tokens(device, grid=(8, 8), dtype=dtype)
    weight = torch.randn_like(v).double()
    gradients = []
    for exact in (True, False):
        inputs = [
            (x.detach().double() if exact else x.detach().clone()).requires_grad_()
            for x in (q, k, v, p, c, torch.tensor(0.05, device=device), torch.tensor(0.1, device=device))
        ]
        *places, s, t = inputs
        options = dict(position_sigma=s, appearance_sigma=t, backend="reference" if exact else backend)
        (hk.neighbor_attention(*places, **options).double() * weight).sum().backward()
        gradients.append([x.grad.double() for x in inputs])
    # Exponents are off by 6e-8 (r / s)^2 = 1.2e-5, and a gradient has both tokens' errors from both passes: 4 of it, of
    # the largest entry. bf16 operands: two roundings of 2^-8. A sigma's gradient is a sum over pairs that cancels, of
    # terms up to (r / s)^2 / s: 4 roundings of the sum of their magnitudes; bf16 results round it more.
    q, k, v, p, c = (x.double() for x in (q, k, v, p, c))
    squares = [torch.cdist(x, x).square() for x in (p.expand(2, -1, -1), c)]
    weights = torch.softmax(q @ k.mT / 4 - squares[0] / (2 * 0.05**2) - squares[1] / (2 * 0.1**2), -1)
    slopes = weights * (weight @ v.mT - (weights @ v * weight).sum(-1, keepdim=True))
    bound = 5e-5 if dtype == torch.float32 else 8e-3
    for number, (expected, found) in enumerate(zip(*gradients, strict=True)):
        if number < 5:
            assert (found - expected).abs().max() <= bound * expected.abs().max()
        elif dtype == torch.float32:
            largest = 0.5 / 0.05**3 if number == 5 else 0.75 / 0.1**3
            assert (found - expected).abs() <= 4 * torch.finfo(torch.float32).eps * slopes.abs().sum() * largest


@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(count, backend, device):
    q, k, v, p, c = (x[:, :count] if x.ndim == 3 else x[:count] for x in tokens(device))
    v = v.clone().requires_grad_()
    found = hk.neighbor_attention(q, k, v, p, c, backend=backend)
    torch.testing.assert_close(found, v)  # its only neighbour is itself
    found.sum().backward()
    assert torch.equal(v.grad, torch.ones_like(v))


def test_compiles_in_one_graph():
    """Traced without a break; the numbers are those of eager torch."""
    q, k, v, p, c = tokens("cpu")
    sigma = torch.tensor(0.1)

    def attend(*tensors):
        return hk.neighbor_attention(*tensors, position_sigma=sigma)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, p, c), attend(q, k, v, p, c))


def test_memory_is_linear():
    """4,096 tokens: their weights alone would be 64 MiB."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for x in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(x, torch.Tensor):
                    self.numbers = max(self.numbers, x.numel())
            return made

    q, k, v, p, c = tokens("cpu", images=1, grid=(64, 64), d=8, d_v=8)
    q.requires_grad_()
    with Largest() as largest:
        hk.neighbor_attention(q, k, v, p, c).sum().backward()
    assert largest.numbers <= 4096 * 32


def test_a_second_backward_is_refused_in_clear_words():
    q, k, v, p, c = tokens("cpu", images=1, grid=(2, 3), d=4, d_v=4)
    for backend in ("reference", None):
        x = q.clone().requires_grad_()
        out = hk.neighbor_attention(x, k, v, p, c, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if backend == "reference":
            assert torch.isfinite(torch.autograd.grad(first.square().sum(), x)[0]).all()
        else:
            with pytest.raises(RuntimeError, match='second backward .* is not available; pass backend="reference"'):
                torch.autograd.grad(first.square().sum(), x)


Q = torch.zeros(2, 6, 4)
ERRORS = [
    (dict(queries=Q[0]), ValueError, "queries: expected 3 or 4 dimensions"),
    (dict(queries=Q.long()), TypeError, "queries: expected float16"),
    (dict(queries=Q[..., :0], keys=Q[..., :0]), ValueError, "queries: expected at least one channel"),
    (dict(keys=Q[:, :5]), ValueError, r"keys: expected the shape of queries, \(2, 6, 4\)"),
    (dict(values=Q[:1]), ValueError, r"values: expected shape \(2, 6, 'd_v'\)"),
    (dict(positions=torch.zeros(3, 6, 2)), ValueError, r"positions: expected \(2, 6, columns\) or \(6, columns\)"),
    (dict(appearance=torch.zeros(5, 3)), ValueError, "appearance: expected"),
    (dict(appearance=[1.0]), TypeError, "appearance: expected a torch.Tensor, got list"),
    (dict(position_sigma=0), ValueError, "position_sigma: expected a finite number > 0, got 0"),
    (dict(appearance_sigma="0.1"), TypeError, "appearance_sigma: expected a Python number"),
    (dict(position_sigma=torch.zeros(2)), ValueError, "position_sigma: expected a number or a 0-dim"),
    (dict(position_sigma=torch.tensor(0.0)), ValueError, "position_sigma: expected a finite number from 1e-09 to"),
    (dict(appearance_sigma=torch.tensor(math.nan)), ValueError, "appearance_sigma: expected a finite"),
    (dict(scale=-1.0), ValueError, "scale: expected a finite number > 0, got -1.0"),
    (dict(values=Q + math.inf), ValueError, "values: expected finite numbers"),
    (dict(positions=torch.full((6, 2), math.nan)), ValueError, "positions: expected finite numbers"),
    (dict(position_sigma=torch.tensor(1.0, device="meta")), ValueError, "position_sigma: expected a tensor on cpu"),
    (dict(queries=Q + 1e30), ValueError, r"queries: expected numbers of at most 1e\+15 in size, got 1e\+30"),
    (dict(positions=1e30 * torch.arange(12.0).view(6, 2)), ValueError, "positions / position_sigma, from the mean"),
    (dict(backend="fast"), ValueError, "backend: 'fast' cannot be used here"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(change, error, message):
    arguments = dict(queries=Q, keys=Q, values=Q, positions=torch.zeros(6, 2), appearance=torch.zeros(2, 6, 3))
    with pytest.raises(error, match=message):
        hk.neighbor_attention(**{**arguments, **change})
