"""What the property tests draw: matrices by shape, kind of numbers, lengths of rows, dtype and layout in memory."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from hpkernels import dispatch

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TEMPERATURES = (0.01, 0.02, 0.025, 0.1, 0.8, 10.0)


@dataclass(frozen=True)
class Kernels:
    """Compiled kernels that this process can run, and what properties may draw for them."""

    name: str  # the backend
    all_backends: tuple[str, ...]  # those that one run of a property draws from
    working_dtypes: tuple[torch.dtype, ...]
    dtypes: tuple[torch.dtype, ...]
    slowness: int = 1  # so many times fewer cases, of fewer rows

    @property
    def backend(self):
        """Any backend of this run."""
        return st.sampled_from(self.all_backends)

    @property
    def native(self):
        """These kernels alone, for what the reference does not promise."""
        return st.just(self.name)

    @property
    def threads(self):
        """Of torch. Others than those of the CPU know none."""
        return st.integers(2, 5) if self is ON_CPU else st.just(1)

    def most(self, many: int, few: int = 0) -> int:
        """A bound on a size: `many` for fast kernels, else `few`, or a sixth."""
        return many if self.slowness == 1 else few or -(-many // 6)


ON_CPU = Kernels("cpu", ("reference", "cpu"), (FP32, FP64), (FP32, FP64, BF16, FP16))
# csrc/cuda compiled for the host; Triton's interpreter, under which a process knows no other kernels, and whose
# products of bf16 are wrong.
ON_HOST = Kernels("cuda", ("cuda",), (FP32,), (FP32, BF16, FP16), slowness=10)
INTERPRETED = Kernels("triton", ("triton",), (FP32,), (FP32, FP16), slowness=10)
KERNELS = (ON_CPU, ON_HOST) if dispatch.why_not("triton", torch.device("cpu")) else (INTERPRETED,)

tried: Counter[str] = Counter()


def tries(
    strategies: Callable[[Kernels], dict], among: Callable[[Kernels], bool] = lambda kernels: True, always: bool = False
):
    """hypothesis.given, once for each of the kernels, with the strategies for them; every case is counted.

    The test is parametrised by the fixture `kernels`. among: those that the property is about; always: whether the
    default suite has it for slow kernels, too.
    """

    def decorate(test):
        def property_on(kernels: Kernels):
            @functools.wraps(test)
            def counted(**drawn):
                tried[kernels.name] += 1
                test(**drawn)

            cases = max(1, hypothesis.settings.default.max_examples // kernels.slowness)
            return hypothesis.settings(max_examples=cases)(hypothesis.given(**strategies(kernels))(counted))

        properties = {kernels: property_on(kernels) for kernels in KERNELS if among(kernels)}

        if not properties:
            return None  # no test here

        params = [
            pytest.param(kernels, id=kernels.name, marks=[] if kernels is ON_CPU or always else pytest.mark.slow)
            for kernels in properties
        ]

        @pytest.mark.parametrize("kernels", params, indirect=True)
        def parametrised(kernels: Kernels) -> None:
            properties[kernels]()

        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(parametrised, attribute, getattr(test, attribute))
        return parametrised

    return decorate


def takes_fp64(kernels: Kernels) -> bool:
    return FP64 in kernels.working_dtypes


KINDS = ("random", "clustered", "duplicates", "integers", "zeros", "constant", "one-hot")
LAYOUTS = ("plain", "transposed", "columns of a wider one", "every second row", "expanded")


@dataclass(frozen=True)
class Matrix:
    """A recipe for a matrix; `tensor()` makes the same one every time."""

    rows: int
    width: int
    kind: str = "random"
    spread: int = 0  # lengths of rows are multiplied by random powers of two up to 2^(+-spread)
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    seed: int = 0

    def tensor(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = self._numbers(generator)
        x = x * torch.exp2(torch.randint(-self.spread, self.spread + 1, (self.rows, 1), generator=generator).double())
        return _laid_out(x.to(self.dtype), self.layout)

    def like(self, rows: int, seed: int, **changes) -> Tensor:
        """Other rows of the same kind and width."""
        return replace(self, rows=rows, seed=seed, **changes).tensor()

    def _numbers(self, generator: torch.Generator) -> Tensor:
        n, d = self.rows, self.width

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        if self.kind == "clustered":
            return normal(3, d)[torch.randint(3, (n,), generator=generator)] + 0.05 * normal(n, d)
        if self.kind == "duplicates":
            return normal(3, d)[torch.randint(3, (n,), generator=generator)]
        if self.kind == "integers":
            return torch.randint(-2, 3, (n, d), generator=generator).double()
        if self.kind == "zeros":
            return normal(n, d) * (torch.rand(n, 1, generator=generator) < 0.6)
        if self.kind == "constant":
            return normal(1, d).repeat(n, 1)
        if self.kind == "one-hot":
            return torch.eye(d, dtype=torch.float64)[torch.randint(d, (n,), generator=generator)]
        return normal(n, d)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "columns of a wider one":
        return torch.nn.functional.pad(x, (1, 2), value=torch.nan)[:, 1 : 1 + x.shape[1]]
    if layout == "every second row":
        return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


def seeds():
    return st.integers(0, 2**16)


def matrices(rows, dtypes, *, max_width: int = 40, kinds=KINDS, max_spread: int = 40):
    """Recipes; rows: a number or a strategy. fp16 has no room for long and short rows."""
    rows = st.just(rows) if isinstance(rows, int) else rows
    recipe = st.builds(
        Matrix, rows=rows, width=st.integers(1, max_width), kind=st.sampled_from(kinds), dtype=st.sampled_from(dtypes),
        spread=st.sampled_from((0, 3, max_spread)), layout=st.sampled_from(LAYOUTS), seed=seeds(),
    )  # fmt: skip
    return recipe.map(lambda m: replace(m, spread=min(m.spread, 3)) if m.dtype == torch.float16 else m)


def strided(x: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


def lengths(x: Tensor) -> Tensor:
    """(N, 1) fp64 norms of the rows."""
    return x.detach().double().norm(dim=1, keepdim=True)


def unit(x: Tensor) -> Tensor:
    """Unit rows in fp64; zero rows stay zero."""
    x = x.detach().double()
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, x / torch.where(length > 0, length, 1.0), 0.0)


def working(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def with_threads(count: int, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def same_bits(a, b) -> bool:
    """Equal to the last bit, tensors or tuples of them."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b))
