"""The 3 x 3 mixing: against its definition in fp64, finite differences, and what must not show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import hpkernels as hk
from tests.properties.cases import Matrix, matrices, same_bits, seeds, takes_fp64, tries, with_threads


@dataclass(frozen=True)
class Grid:
    images: int
    heads: int
    height: int
    width: int
    seed: int

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def draw(self, *shape: int, dtype=torch.float64, shift: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(self.seed + shift)
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    def attention(self, kind: str, dtype=torch.float64) -> Tensor:
        """Logits (images, heads, T, T): of a softmax with zeros, in ties, far apart, or all the same."""
        x = self.draw(self.images, self.heads, self.tokens, self.tokens)
        if kind == "underflowed":
            x = x.masked_fill(x > 0.5, -torch.inf)
        if kind == "ties":
            x = x.round()
        if kind == "constant":
            x = x[..., :1].expand(x.shape)
        return (x * 1e4 if kind == "far" else x).to(dtype)


def grids(on):
    side = st.integers(1, on.most(9, 4))
    return st.builds(Grid, st.integers(0, 3), st.integers(1, 3), side, side, seeds())


KINDS = ("random", "underflowed", "ties", "constant", "far")


def weights_by_definition(logits: Tensor, grid: Grid, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The published weights in fp64, and of each tap how far its logit is above the threshold of its row."""
    mean = logits.double().clamp_min(-1e30).mean(1)
    clamped = mean.clamp(mean.quantile(low, 2, keepdim=True), mean.quantile(high, 2, keepdim=True))
    softmax = clamped.softmax(2)
    weights = torch.zeros(grid.images, grid.tokens, 9, dtype=torch.float64)
    above = torch.full_like(weights, torch.inf)
    for t in range(grid.tokens):
        taps = [
            (n, yy * grid.width + xx)
            for n in range(9)
            for yy, xx in [(t // grid.width + n // 3 - 1, t % grid.width + n % 3 - 1)]
            if 0 <= yy < grid.height and 0 <= xx < grid.width
        ]
        for n, j in taps:
            share = softmax[:, t, j]
            above[:, t, n] = share.log() + math.log(grid.tokens)
            weights[:, t, n] = torch.where(share * grid.tokens >= 1, 28.0 * share / len(taps), 0.0)
    return weights, above


@tries(
    lambda on: dict(
        grid=grids(on), kind=st.sampled_from(KINDS),
        quantiles=st.sampled_from(((0.1, 0.9), (0.0, 1.0), (0.5, 0.5), (0.3, 0.31))),
        dtype=st.sampled_from(on.dtypes), backend=on.backend,
    ),
    always=True,
)  # fmt: skip
def test_weights_are_their_definition(grid: Grid, kind, quantiles, dtype, backend):
    attention = grid.attention(kind, dtype)
    low, high = quantiles
    found = hk.neighbor_weights(attention, grid.size, low_quantile=low, high_quantile=high, backend=backend)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if not found.numel():
        return
    expected, above = weights_by_definition(attention, grid, low, high)
    eps = torch.finfo(found.dtype).eps
    size = attention.double().clamp_min(-1e30).abs().amax((1, 3))[..., None]
    near = 64 * eps * (1 + size)
    kept = (found > 0) == (expected > 0)
    assert (kept | (above.abs() <= near)).all()
    assert torch.isfinite(found).all() and ((found - expected).abs() <= expected * near + 1e-30)[kept].all()


@tries(
    lambda on: dict(
        grid=grids(on), depth=st.integers(1, 12), spread=st.sampled_from((1.0, 30.0)),
        dtype=st.sampled_from(on.working_dtypes), backend=on.backend,
    ),
)  # fmt: skip
def test_queries_and_keys_make_the_same_weights(grid: Grid, depth, spread, dtype, backend):
    """Read in place from a projection (B, tokens, 3, heads, d)."""
    qkv = spread * grid.draw(grid.images, grid.tokens + 1, 3, grid.heads, depth)
    queries, keys, _ = qkv.to(dtype).permute(2, 0, 3, 1, 4)[:, :, :, 1:]
    found = hk.neighbor_weights_qk(queries, keys, grid.size, backend=backend)
    if not found.numel():
        return
    logits = queries.double() @ keys.double().transpose(2, 3) * depth**-0.5
    expected, above = weights_by_definition(logits, grid, 0.1, 0.9)
    near = 64 * torch.finfo(found.dtype).eps * (1 + logits.abs().amax((1, 3))[..., None]) * (depth * grid.heads) ** 0.5
    kept = (found > 0) == (expected > 0)
    assert (kept | (above.abs() <= near)).all() and ((found - expected).abs() <= expected * near + 1e-30)[kept].all()


@tries(
    lambda on: dict(
        grid=grids(on), code=matrices(1, on.dtypes, max_width=30), taps=st.sampled_from(("positive", "any", "zero")),
        backend=on.backend,
    ),
    always=True,
)  # fmt: skip
def test_mixing_is_its_definition(grid: Grid, code: Matrix, taps, backend):
    code = code.like(grid.images * grid.tokens, code.seed, layout="plain").view(grid.images, grid.tokens, code.width)
    weights = grid.draw(grid.images, grid.tokens, 9, dtype=torch.float32, shift=1)
    weights = weights.abs() if taps == "positive" else weights * (taps == "any")
    mixed = hk.neighbor_mix(code, weights, grid.size, backend=backend)
    assert mixed.dtype == code.dtype and mixed.shape == code.shape
    padded = torch.nn.functional.pad(code.double().unflatten(1, grid.size), (0, 0, 1, 1, 1, 1))
    terms = [
        weights.double()[..., n, None]
        * padded[:, n // 3 : n // 3 + grid.height, n % 3 : n % 3 + grid.width].flatten(1, 2)
        for n in range(9)
    ]
    size = sum(term.abs() for term in terms)
    eps = torch.finfo(torch.float32).eps if code.dtype != torch.float64 else 2.3e-16
    smallest = torch.finfo(code.dtype).tiny
    off = (mixed.double() - sum(terms)).abs()
    assert (off <= 16 * eps * size + torch.finfo(code.dtype).eps * sum(terms).abs() + smallest).all()


@tries(
    lambda on: dict(
        grid=grids(on), depth=st.integers(1, 20), threads=on.threads, kind=st.sampled_from(KINDS),
        native=on.native,
    ),
)  # fmt: skip
def test_threads_layouts_and_neighbours_in_the_batch_do_not_show(grid: Grid, depth, threads, kind, native):
    attention = grid.attention(kind, torch.float32)
    code = grid.draw(grid.images, grid.tokens, depth, dtype=torch.float32)

    def mix(code: Tensor, attention: Tensor) -> Tensor:
        return hk.local_mix(code, attention, grid.size, backend=native)

    whole = mix(code, attention)
    assert same_bits(with_threads(threads, lambda: mix(code, attention)), whole)
    strided = torch.stack([attention, attention + 1], -1)[..., 0]
    assert torch.equal(mix(code.transpose(1, 2).contiguous().transpose(1, 2), strided), whole)
    as_map = code.transpose(1, 2).reshape(grid.images, depth, *grid.size)
    assert torch.equal(mix(as_map, attention).flatten(2).transpose(1, 2), whole)
    order = torch.randperm(grid.images)
    assert torch.equal(mix(code[order], attention[order]), whole[order])


@tries(lambda on: dict(grid=grids(on), depth=st.integers(1, 5), backend=on.backend))
def test_mirrored_images_and_constants_of_rows(grid: Grid, depth, backend):
    """Logits of images turned upside down make the same codes upside down; a constant added to a row changes nothing.

    Logits are whole numbers, and so is the constant: no rounding moves one of them across a threshold.
    """
    attention = grid.attention("ties", torch.float32)
    code = grid.draw(grid.images, grid.tokens, depth, dtype=torch.float32)
    shift = grid.draw(grid.images, 1, grid.tokens, 1, dtype=torch.float32, shift=1).mul(8).round()
    whole = hk.local_mix(code, attention[:, :1], grid.size, backend=backend)
    shifted = hk.local_mix(code, attention[:, :1] + shift, grid.size, backend=backend)
    turned = hk.local_mix(code.flip(1), attention[:, :1].flip(2, 3), grid.size, backend=backend).flip(1)
    for other in (shifted, turned):
        torch.testing.assert_close(other, whole, rtol=2e-5, atol=1e-4)


@tries(
    lambda on: dict(
        grid=grids(on), depth=st.integers(1, 6), which=st.sampled_from(("code", "weights", "both")),
        backend=on.backend,
    ),
    takes_fp64,
)  # fmt: skip
def test_gradients_of_a_bilinear_map(grid: Grid, depth, which, backend):
    """Bilinear: differences are derivatives, of any step; one of the two may require no gradient."""
    code, weights = grid.draw(grid.images, grid.tokens, depth), grid.draw(grid.images, grid.tokens, 9, shift=1)
    wanted = [x for name, x in (("code", code), ("weights", weights)) if which in (name, "both")]
    for x in wanted:
        x.requires_grad_()
    out = hk.neighbor_mix(code, weights, grid.size, backend=backend)
    g = grid.draw(*out.shape, shift=2)
    grads = torch.autograd.grad(out, wanted, g)
    for x, grad in zip(wanted, grads):
        step = grid.draw(*x.shape, shift=3)
        pair = (step, weights.detach()) if x is code else (code.detach(), step)
        change = (hk.neighbor_mix(*pair, grid.size, backend="reference") * g).sum()
        assert abs((grad * step).sum() - change) <= 1e-12 * (1 + (grad * step).abs().sum())
