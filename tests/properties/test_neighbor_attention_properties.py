"""Attention among neighbours: against its definition in fp64, finite differences, and what must not show.

It is made of torch ops on every backend: the properties are those of the reference and of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

import hpkernels as hk
from tests.properties.cases import ON_CPU, seeds, strided, tries

NAMES = ("queries", "keys", "values", "positions", "appearance")


@dataclass(frozen=True)
class Problem:
    images: int
    heads: int
    tokens: int
    depth: int
    kind: str  # of the places: all different, all the same, or few different ones
    sigma: float
    dtype: torch.dtype
    shared: bool  # places, by all images
    seed: int

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def places(columns: int) -> Tensor:
            x = draw(1 if self.shared else self.images, self.tokens, columns)
            x = x[:, :1].expand_as(x) if self.kind == "constant" else x.round() if self.kind == "ties" else x
            return x[0] if self.shared else x

        widths = (self.depth, self.depth, self.depth + 1)
        tokens = [draw(self.images, self.heads, self.tokens, width) for width in widths]
        return {name: x.to(self.dtype) for name, x in zip(NAMES, (*tokens, places(2), places(3)), strict=True)}

    def attend(self, tensors: dict[str, Tensor], backend: str | None = None) -> Tensor:
        sigmas = {"position_sigma": self.sigma, "appearance_sigma": 2 * self.sigma}
        return hk.neighbor_attention(**tensors, **sigmas, backend=backend)

    def expected(self, tensors: dict[str, Tensor]) -> Tensor:
        q, k, v, p, c = (tensors[name].double() for name in NAMES)
        exponents = q @ k.transpose(-1, -2) * self.depth**-0.5
        for x, sigma in ((p, self.sigma), (c, 2 * self.sigma)):
            squares = (x[..., :, None, :] - x[..., None, :, :]).square().sum(-1)
            exponents = exponents - (squares if self.shared else squares[:, None]) / (2 * sigma**2)
        return exponents.softmax(-1) @ v

    @property
    def rounding(self) -> float:
        """Relative, of a weight: exponents up to (distance / sigma)^2 in fp32, off as the docstring says."""
        working = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.finfo(working).eps * (64 + 8 * (6 / self.sigma) ** 2) + 2 * torch.finfo(self.dtype).eps


@st.composite
def problems(draw, dtypes=ON_CPU.dtypes, least_images=0, most_images=3, sigmas=(0.3, 1.0, 10.0)):
    return Problem(
        draw(st.integers(least_images, most_images)), draw(st.integers(1, 3)), draw(st.integers(1, 24)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(("different", "constant", "ties"))), draw(st.sampled_from(sigmas)),
        draw(st.sampled_from(dtypes)), draw(st.booleans()), draw(seeds()),
    )  # fmt: skip


def on_cpu(kernels) -> bool:
    return kernels is ON_CPU


@tries(lambda on: dict(p=problems(), backend=on.backend), on_cpu)
def test_attention_is_its_definition(p: Problem, backend):
    tensors = p.tensors()
    found = p.attend(tensors, backend)
    assert found.dtype == p.dtype and found.shape == tensors["values"].shape
    size = 1 + tensors["values"].double().abs().amax() if found.numel() else 0
    assert ((found.double() - p.expected(tensors)).abs() <= p.rounding * size).all()


@tries(lambda on: dict(p=problems(), backend=on.backend), on_cpu)
def test_order_of_tokens_shifts_of_places_and_layouts_do_not_show(p: Problem, backend):
    tensors = p.tensors()
    whole = p.attend(tensors, backend).double()
    order = torch.randperm(p.tokens, generator=torch.Generator().manual_seed(p.seed))
    moved = p.attend({name: x[..., order, :] for name, x in tensors.items()}, backend).double()
    shifted = p.attend(tensors | {"positions": tensors["positions"] + 1}, backend).double()
    spread = p.attend({name: strided(x) for name, x in tensors.items()}, backend).double()
    size = 1 + tensors["values"].double().abs().amax() if whole.numel() else 0
    room = 0.0 if p.dtype in (torch.float32, torch.float64) else 8 * torch.finfo(p.dtype).eps * (6 / p.sigma) ** 2
    assert ((moved - whole[..., order, :]).abs() <= 2 * p.rounding * size).all()
    assert ((shifted - whole).abs() <= (2 * p.rounding + room) * size).all()  # a 16-bit sum is rounded
    assert ((spread - whole).abs() <= 2 * p.rounding * size).all()


@tries(
    lambda on: dict(
        p=problems((torch.float64,), 1, 2), which=st.sets(st.sampled_from(NAMES), min_size=1), backend=on.backend
    ),
    on_cpu,
)
def test_gradients_are_those_of_finite_differences(p: Problem, which, backend):
    """Of any of the tensors; the others require none."""
    tensors = p.tensors()
    wanted = [tensors[name].requires_grad_() for name in sorted(which)]
    generator = torch.Generator().manual_seed(p.seed + 1)
    g, *steps = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (tensors["values"], *wanted))
    grads = torch.autograd.grad((p.attend(tensors, backend) * g).sum(), wanted)
    h, plain = 1e-5 * min(1.0, p.sigma) ** 2, {name: x.detach() for name, x in tensors.items()}

    def at(sign: int) -> Tensor:
        there = {name: plain[name] + sign * h * step for name, step in zip(sorted(which), steps)}
        return (p.attend(plain | there, backend) * g).sum()

    slope, scale = (sum(f(grad * step).sum() for grad, step in zip(grads, steps)) for f in (torch.clone, torch.abs))
    rounding = 1e-13 * g.abs().sum() * (1 + (6 / p.sigma) ** 2) / h
    assert abs((at(1) - at(-1)) / (2 * h) - slope) <= 1e-4 * (1 + scale) + rounding


@tries(lambda on: dict(p=problems((torch.float32,), 2, 3), backend=on.backend), on_cpu)
def test_images_do_not_show_in_each_other(p: Problem, backend):
    p = replace(p, shared=False)
    tensors = p.tensors()
    whole = p.attend(tensors, backend)
    for image in range(p.images):
        alone = p.attend({name: x[image : image + 1] for name, x in tensors.items()}, backend)
        torch.testing.assert_close(alone[0], whole[image], rtol=p.rounding, atol=p.rounding)
