"""The losses over pairs: against the definition in fp64, finite differences, and what must not show."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import hpkernels as hk
from hpkernels.losses import panels
from tests import oracle
from tests.properties.cases import (
    FP32,
    FP64,
    TEMPERATURES,
    Matrix,
    lengths,
    matrices,
    same_bits,
    seeds,
    takes_fp64,
    tries,
    unit,
    with_threads,
)

BASE = 0.07
RATES = (0.0, 0.02, 0.06, 0.3, 1.0)
HIGHEST_SPREAD = 40


@dataclass(frozen=True)
class Problem:
    """Patches of `images` x `tokens`; features are one-hot, so that every backend decides every pair alike."""

    images: int
    tokens: int
    z: Matrix
    local: bool
    classes: int
    shared: int  # classes that the pool holds: their patches are positives of nothing
    k: int | None  # instead of the pool
    head_weight: float | None
    rate: float
    temperature: float
    weighting: str
    seed: int

    @property
    def count(self) -> int:
        return self.images * self.tokens

    def features(self, seed: int) -> Tensor:
        one_hot = Matrix(self.count, self.classes, "one-hot", spread=3, dtype=torch.float32, seed=seed)
        return one_hot.tensor()

    def arguments(self) -> dict[str, object]:
        pool = torch.eye(self.classes + 1)[: self.shared + 1, 1:]  # a zero row, so that the pool is never empty
        rule = dict(pool=pool) if self.k is None else dict(positives_per_anchor=self.k)
        given = dict(
            features=self.features(self.seed), tokens_per_image=self.tokens, negative_rate=self.rate, seed=self.seed,
            temperature=self.temperature, base_temperature=BASE, weighting=self.weighting, **rule,
        )  # fmt: skip
        if self.head_weight is not None:
            given |= dict(head_features=self.features(self.seed + 1), head_weight=self.head_weight)
            given |= {} if self.k else dict(head_pool=pool)
        return given

    def streams(self) -> list[Tensor]:
        return [self.z.tensor(), self.z.like(self.count, self.z.seed + 1)][: 1 + self.local]

    def loss(self, streams: list[Tensor], backend: str, **changes):
        arguments = self.arguments() | changes
        if len(streams) > 1:
            arguments["z_local"] = streams[1]
        return hk.hidden_positive_loss(streams[0], backend=backend, **arguments)

    def run(self, backend: str, dtype: torch.dtype | None = None, **changes) -> list[Tensor]:
        """The loss and the gradients of the streams."""
        streams = [x.to(dtype or x.dtype).requires_grad_() for x in self.streams()]
        loss = self.loss(streams, backend, **changes)
        return [loss.detach(), *torch.autograd.grad(loss, streams)]

    def expected(self) -> float:
        def pairs(seed: int):
            f = self.features(seed).numpy()
            return oracle.nearest(f, self.k) if self.k else oracle.positives(f, self.arguments()["pool"].numpy())

        M = None
        if self.rate < 1:
            mask = hk.PairMask.random(self.rate, (self.tokens, self.count), self.seed, backend="reference")
            M = mask.to_dense().numpy()
        Q = None if self.head_weight is None else pairs(self.seed + 1)
        streams = [x.double().numpy() for x in self.streams()]
        return oracle.loss(
            streams,
            pairs(self.seed),
            Q,
            M,
            self.head_weight or 0.0,
            self.tokens,
            self.temperature,
            BASE,
            self.weighting,
        )

    def rounding(self, dtype: torch.dtype) -> float:
        """Of the loss: logits up to 1 / temperature, off by 4 eps sqrt(D) of it, in a weighted mean of lse_i - l_ij."""
        weight = 1 + (self.head_weight or 0.0 if self.weighting == "separate" else 0.0)
        steps = 4 * self.z.width**0.5 / self.temperature + 4 * np.log(2 + self.count)
        return float(torch.finfo(dtype).eps * steps * weight * self.temperature / BASE)

    def gradient_rounding(self, dtype: torch.dtype) -> float:
        """Of the gradient times the lengths of the rows: at most four sums of weights that make one, each times
        1 / base_temperature, from exponentials of logits that are off as above."""
        return 4 / self.temperature * (1 + 1 / self.temperature) * self.rounding(dtype)


@st.composite
def problems(draw, on, dtypes=None, temperatures=TEMPERATURES, max_spread=HIGHEST_SPREAD, kinds=None, few=False):
    images, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 8 if few else on.most(40, 8)))
    count = images * tokens
    options = {} if kinds is None else dict(kinds=kinds)
    z = draw(matrices(count, dtypes or on.working_dtypes, max_spread=max_spread, **options))
    classes = draw(st.integers(1, 6))
    k = draw(st.none() | st.integers(1, min(5, count - 1))) if count > 1 else None
    return Problem(
        images, tokens, z, draw(st.booleans()), classes, draw(st.integers(0, classes)), k,
        draw(st.sampled_from((None, 0.0, 1e-3, 1.0, 100.0))), draw(st.sampled_from(RATES)),
        draw(st.sampled_from(temperatures)), draw(st.sampled_from(("pairs", "anchors", "separate"))), draw(seeds()),
    )  # fmt: skip


@tries(lambda on: dict(p=problems(on, on.dtypes), backend=on.backend), always=True)
def test_the_loss_is_its_definition(p: Problem, backend):
    loss = p.loss(p.streams(), backend)
    assert loss.dtype == (torch.float64 if p.z.dtype == torch.float64 else torch.float32)
    assert abs(loss.item() - p.expected()) <= p.rounding(loss.dtype)


@tries(lambda on: dict(p=problems(on), native=on.native), always=True)
def test_gradients_of_backends_agree(p: Problem, native):
    """The reference's in fp64, by plain autograd, is what the others are held to, in units of the rows' lengths."""
    exact, found = p.run("reference", torch.float64), p.run(native)
    for x, ours, theirs in zip(p.streams(), found[1:], exact[1:]):
        assert ours.dtype == x.dtype and torch.isfinite(ours).all()
        long_enough = lengths(x) * torch.finfo(x.dtype).max > 1e6
        off = ((ours.double() - theirs) * lengths(x))[long_enough[:, 0]]
        assert off.norm() <= p.gradient_rounding(x.dtype)
        assert not ours[lengths(x)[:, 0] == 0].any()


@tries(lambda on: dict(p=problems(on, (FP64,), max_spread=3, few=True), backend=on.backend), takes_fp64)
def test_gradients_are_those_of_finite_differences(p: Problem, backend):
    """Along a random direction, of every row as far as it is long; zero rows have no derivative."""
    streams = p.streams()
    _, *grads = p.run(backend)
    generator = torch.Generator().manual_seed(p.seed)
    steps = [lengths(x) * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in streams]
    h = 1e-4 * min(1.0, p.temperature) / p.z.width**0.5
    there, back = (p.loss([x + sign * h * v for x, v in zip(streams, steps)], backend) for sign in (1, -1))
    slope = sum((g * v).sum() for g, v in zip(grads, steps))
    scale = sum((g * v).abs().sum() for g, v in zip(grads, steps)) + (1 + (p.head_weight or 0)) / BASE
    assert abs((there - back) / (2 * h) - slope) <= 1e-4 * scale + 4 * p.rounding(torch.float64) / h


@tries(lambda on: dict(p=problems(on), backend=on.backend))
def test_one_stream_requires_a_gradient(p: Problem, backend):
    p = replace(p, local=True)
    both = p.run(backend)
    for which in (0, 1):
        streams = [x.requires_grad_(n == which) for n, x in enumerate(p.streams())]
        loss = p.loss(streams, backend)
        (grad,) = torch.autograd.grad(loss, streams[which])
        assert torch.equal(loss.detach(), both[0]) and torch.equal(grad, both[1 + which])


@tries(lambda on: dict(p=problems(on, (FP32,), max_spread=3), power=st.integers(-60, 60), backend=on.backend))
def test_lengths_of_rows_do_not_show(p: Problem, power, backend):
    """Powers of two change no digit of unit rows: the same loss to the last bit, the gradient by the inverse factor."""
    first = p.run(backend)
    factor = 2.0**power
    streams = [(x * factor).requires_grad_() for x in p.streams()]
    loss = p.loss(streams, backend, features=p.features(p.seed) * factor)
    grads = torch.autograd.grad(loss, streams)
    assert torch.equal(loss.detach(), first[0])
    tiny = torch.finfo(torch.float32).tiny
    for grad, before in zip(grads, first[1:]):
        assert torch.allclose(grad, before / factor, rtol=1e-6, atol=8 * tiny)


@tries(
    lambda on: dict(
        p=problems(on, (FP64,)), density=st.sampled_from((0.0, 0.1, 1.0)), backend=on.backend,
    ),
    takes_fp64,
)  # fmt: skip
def test_order_of_images_and_of_tokens_does_not_show(p: Problem, density, backend):
    p = replace(p, k=None)
    generator = torch.Generator().manual_seed(p.seed)
    mask = torch.rand(p.tokens, p.count, generator=generator) < density
    given = p.arguments() | dict(negative_mask=mask)
    given.pop("negative_rate")
    images, tokens = (torch.randperm(n, generator=generator) for n in (p.images, p.tokens))
    order = (images[:, None] * p.tokens + tokens).flatten()
    moved = given | {name: given[name][order] for name in ("features", "head_features") if name in given}
    moved["negative_mask"] = mask[tokens][:, order]
    first = p.run(backend, **given)
    streams = [x[order].requires_grad_() for x in p.streams()]
    loss = p.loss(streams, backend, **moved)
    assert abs(loss.detach() - first[0]) <= p.rounding(torch.float64)
    for x, grad, before in zip(streams, torch.autograd.grad(loss, streams), first[1:]):
        assert ((grad - before[order]) * lengths(x)).norm() <= p.gradient_rounding(torch.float64)


@tries(lambda on: dict(p=problems(on, (FP32,)), threads=on.threads, native=on.native))
def test_threads_and_earlier_calls_do_not_show(p: Problem, threads, native):
    other, state = torch.randn(90, 33), torch.get_rng_state()
    first = p.run(native)
    hk.hidden_positive_loss(other, other, positives_per_anchor=3, seed=1, backend=native)
    assert same_bits(with_threads(threads, lambda: p.run(native)), first)
    assert same_bits(p.run(native, seed=torch.tensor(p.seed)), first)
    assert same_bits([p.loss([x.contiguous() for x in p.streams()], native)], first[:1])
    assert torch.equal(torch.get_rng_state(), state)  # a seed was given


@tries(lambda on: dict(p=problems(on, on.working_dtypes[-1:]), multiple=st.sampled_from((32, 64)), backend=on.backend))
def test_panels_do_not_show(p: Problem, multiple, backend):
    """All bits at once, or a panel of anchors at a time."""
    whole = p.run(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "PANEL_MULTIPLE", multiple)
        patch.setenv("HPKERNELS_BITS_BYTES", "1")
        parts = p.run(backend)
    dtype = p.z.dtype
    assert abs(parts[0] - whole[0]) <= 2 * p.rounding(dtype)
    for x, ours, theirs in zip(p.streams(), parts[1:], whole[1:]):
        off = ((ours - theirs).double() * lengths(x))[lengths(x)[:, 0] * torch.finfo(dtype).max > 1e6]
        assert off.norm() <= 2 * p.gradient_rounding(dtype)


@tries(
    lambda on: dict(
        p=problems(on), density=st.sampled_from((0.0, 0.05, 1.0)), extra=st.booleans(), whole=st.booleans(),
        backend=on.backend,
    ),
)  # fmt: skip
def test_any_pairs_any_denominator(p: Problem, density, extra, whole, backend):
    """masked_contrastive_loss with asymmetric pairs, none of them or all."""
    generator = torch.Generator().manual_seed(p.seed)

    def draw(rows: int, density: float) -> Tensor:
        return torch.rand(rows, p.count, generator=generator) < density

    P, Q = draw(p.count, density), draw(p.count, 0.2) if extra else None
    M = None if whole else draw(p.tokens if p.seed % 2 else p.count, 0.1)
    weight = (p.head_weight or 0.0) if extra else 0.0
    p = replace(p, head_weight=weight)
    z = p.z.tensor().requires_grad_()
    pack = hk.PairMask.from_dense
    loss = hk.masked_contrastive_loss(
        z, pack(P), extra_positives=None if Q is None else pack(Q), extra_weight=weight,
        negatives=None if M is None else pack(M), tokens_per_image=p.tokens, temperature=p.temperature,
        base_temperature=BASE, weighting=p.weighting, backend=backend,
    )  # fmt: skip
    arrays = [None if mask is None else mask.numpy() for mask in (P, Q, M)]
    exact = oracle.loss([z.detach().double().numpy()], *arrays, weight, p.tokens, p.temperature, BASE, p.weighting)
    assert abs(loss.item() - exact) <= p.rounding(z.dtype)
    (grad,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(grad).all()
    if not density and not (extra and p.weighting == "separate"):
        assert loss.item() == 0 and not grad.any()
    order = torch.randperm(p.images, generator=generator)[:, None] * p.tokens + torch.arange(p.tokens)
    order = order.flatten()
    by_image = slice(None) if M is None or len(M) < p.count else order  # rows that all images share stay
    moved = hk.masked_contrastive_loss(
        z.detach()[order], pack(P[order][:, order]), extra_positives=None if Q is None else pack(Q[order][:, order]),
        extra_weight=torch.tensor(weight, dtype=torch.float64) if extra else 0.0,
        negatives=None if M is None else pack(M[by_image][:, order]), tokens_per_image=p.tokens,
        temperature=p.temperature, base_temperature=BASE, weighting=p.weighting, backend=backend,
    )  # fmt: skip
    assert abs(moved - loss.detach()) <= 2 * p.rounding(z.dtype)
    radial = (grad.double() * unit(z)).sum(1) * lengths(z)[:, 0]
    assert (radial.abs() <= p.gradient_rounding(z.dtype)).all()


@tries(lambda on: dict(images=st.integers(0, 3), tokens=st.integers(0, 2), width=st.integers(1, 5), backend=on.backend))
def test_no_patches_and_lone_ones(images, tokens, width, backend):
    """N = 0 and N = 1: a loss of 0 and zero gradients wherever there are no pairs."""
    z = torch.randn(images, tokens, width).requires_grad_()
    features = torch.eye(3)[torch.arange(images * tokens) % 3]
    loss = hk.hidden_positive_loss(z, features, torch.eye(3), seed=0, backend=backend)
    loss.backward()
    assert loss.item() == 0 and z.grad.shape == z.shape and not z.grad.any()
