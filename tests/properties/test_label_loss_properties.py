"""The loss by labels: against its definition in fp64, finite differences, and what must not show."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import hpkernels as hk
from hpkernels.ops.label_positives import blocked
from tests.properties.cases import (
    FP32,
    FP64,
    TEMPERATURES,
    Matrix,
    lengths,
    matrices,
    same_bits,
    seeds,
    strided,
    takes_fp64,
    tries,
    unit,
    with_threads,
)


@dataclass(frozen=True)
class Problem:
    z: Matrix
    bank: int | None  # rows of keys; None: z against itself
    classes: int
    images: int  # 0: no image_ids
    temperature: float
    form: str
    seed: int

    def labels(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(count: int, high: int) -> Tensor:
            return torch.randint(-1, high, (count,), generator=generator)

        n, m = self.z.rows, self.bank or 0
        found = dict(labels=draw(n, self.classes), images=draw(n, max(1, self.images)))
        if self.bank is not None:
            found |= dict(key_labels=draw(m, self.classes), key_images=draw(m, max(1, self.images)))
        return found

    def rows(self) -> list[Tensor]:
        return [self.z.tensor()] + ([] if self.bank is None else [self.z.like(self.bank, self.seed + 1)])

    def loss(self, rows: list[Tensor], backend: str, ids: dict[str, Tensor] | None = None) -> Tensor:
        ids = {name: strided(x) for name, x in (ids or self.labels()).items()}
        given = {}
        if self.bank is not None:
            given = dict(keys=rows[1], key_labels=ids["key_labels"])
        if self.images:
            given["image_ids"] = ids["images"] if self.bank is None else (ids["images"], ids["key_images"])
        return hk.supervised_contrastive_loss(
            rows[0], ids["labels"], temperature=self.temperature, form=self.form, backend=backend, **given
        )

    def run(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        rows = [x.to(dtype or x.dtype).requires_grad_() for x in self.rows()]
        loss = self.loss(rows, backend)
        return [loss.detach(), *torch.autograd.grad(loss, rows)]

    def expected(self) -> float:
        """The definition, pair by pair, in fp64."""
        ids, rows = self.labels(), [unit(x) for x in self.rows()]
        itself = self.bank is None
        own, theirs = ids["labels"], ids["labels"] if itself else ids["key_labels"]
        s = rows[0] @ rows[-1].T / self.temperature
        taking = (own >= 0)[:, None] & (theirs >= 0)[None]
        P, N = taking & (own[:, None] == theirs), taking & (own[:, None] != theirs)
        if self.images:
            P &= ids["images"][:, None] != (ids["images"] if itself else ids["key_images"])
        elif itself:
            P.fill_diagonal_(False)
        terms = []
        for p, n, row in zip(P, N, s):
            if not (p.any() and n.any()):
                continue
            if self.form == "supcon":
                terms.append(row[p | n].logsumexp(0) - row[p].mean())
            else:
                above = row[n].logsumexp(0) - row[p]
                terms.append((above.clamp_min(0) + torch.log1p(torch.exp(-above.abs()))).mean())
        return float(torch.stack(terms).mean()) if terms else 0.0

    def rounding(self, dtype: torch.dtype) -> float:
        rows = 2 + self.z.rows + (self.bank or 0)
        return torch.finfo(dtype).eps * (4 * self.z.width**0.5 / self.temperature + 4 * torch.tensor(rows).log().item())


@st.composite
def problems(draw, on, dtypes=None, temperatures=TEMPERATURES, max_spread=40):
    limit = on.most(130)
    z = draw(matrices(st.integers(0, limit), dtypes or on.working_dtypes, max_spread=max_spread))
    return Problem(
        z, draw(st.none() | st.integers(0, limit)), draw(st.sampled_from((1, 2, 4, 60))),
        draw(st.sampled_from((0, 1, 4))), draw(st.sampled_from(temperatures)),
        draw(st.sampled_from(("supcon", "per_positive"))), draw(seeds()),
    )  # fmt: skip


@tries(lambda on: dict(p=problems(on, on.dtypes), backend=on.backend), always=True)
def test_the_loss_is_its_definition(p: Problem, backend):
    loss = p.loss(p.rows(), backend)
    assert loss.dtype == (torch.float64 if p.z.dtype == torch.float64 else torch.float32)
    assert abs(loss.item() - p.expected()) <= p.rounding(loss.dtype)


@tries(lambda on: dict(p=problems(on), native=on.native), always=True)
def test_gradients_of_backends_agree(p: Problem, native):
    exact, found = p.run("reference", torch.float64), p.run(native)
    for x, ours, theirs in zip(p.rows(), found[1:], exact[1:]):
        assert ours.dtype == x.dtype and torch.isfinite(ours).all()
        off = ((ours.double() - theirs) * lengths(x))[lengths(x)[:, 0] * torch.finfo(x.dtype).max > 1e6]
        assert (
            off.norm()
            <= 4 / p.temperature * (1 + p.rounding(x.dtype) / torch.finfo(x.dtype).eps) * torch.finfo(x.dtype).eps
        )
        assert not ours[lengths(x)[:, 0] == 0].any()


@tries(lambda on: dict(p=problems(on, (FP64,), max_spread=3), backend=on.backend), takes_fp64)
def test_gradients_are_those_of_finite_differences(p: Problem, backend):
    rows = p.rows()
    _, *grads = p.run(backend)
    generator = torch.Generator().manual_seed(p.seed)
    steps = [lengths(x) * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in rows]
    h = 1e-4 * min(1.0, p.temperature) / p.z.width**0.5
    there, back = (p.loss([x + sign * h * v for x, v in zip(rows, steps)], backend) for sign in (1, -1))
    slope = sum((g * v).sum() for g, v in zip(grads, steps))
    scale = sum((g * v).abs().sum() for g, v in zip(grads, steps)) + 1 / p.temperature
    assert abs((there - back) / (2 * h) - slope) <= 1e-4 * scale + 4 * p.rounding(torch.float64) / h


@tries(lambda on: dict(p=problems(on), backend=on.backend))
def test_rows_or_keys_alone_require_a_gradient(p: Problem, backend):
    p = replace(p, bank=p.bank or 7)
    both = p.run(backend)
    for which in (0, 1):
        rows = [x.requires_grad_(n == which) for n, x in enumerate(p.rows())]
        loss = p.loss(rows, backend)
        (grad,) = torch.autograd.grad(loss, rows[which])
        assert torch.equal(loss.detach(), both[0]) and torch.equal(grad, both[1 + which])


@tries(lambda on: dict(p=problems(on, (FP64,)), backend=on.backend), takes_fp64)
def test_order_of_rows_and_names_of_labels_do_not_show(p: Problem, backend):
    rows, ids, generator = p.rows(), p.labels(), torch.Generator().manual_seed(p.seed)
    orders = [torch.randperm(len(x), generator=generator) for x in rows]
    names = torch.randint(0, 2**62, (70,), generator=generator).unique()[torch.randperm(60, generator=generator)]
    moved = {}
    for name, values in ids.items():
        values = values[orders[name.startswith("key")]]
        moved[name] = torch.where(values < 0, -1, names[values.clamp_min(0)])
    first, loss = p.loss(rows, backend), p.loss([x[order] for x, order in zip(rows, orders)], backend, moved)
    assert abs(first - loss) <= 2 * p.rounding(torch.float64)


@tries(
    lambda on: dict(
        p=problems(on, (FP32,)), threads=on.threads, power=st.integers(-60, 60), native=on.native,
    ),
)  # fmt: skip
def test_threads_earlier_calls_and_lengths_do_not_show(p: Problem, threads, power, native):
    first = p.run(native)
    hk.supervised_contrastive_loss(torch.randn(70, 9), torch.arange(70) % 3, form=p.form, backend=native)
    assert same_bits(with_threads(threads, lambda: p.run(native)), first)
    p = replace(p, z=replace(p.z, spread=0))
    assert torch.equal(p.loss([x * 2.0**power for x in p.rows()], native), p.loss(p.rows(), native))


@tries(lambda on: dict(p=problems(on, on.working_dtypes[-1:]), pairs=st.sampled_from((1, 50, 999)), native=on.native))
def test_blocks_do_not_show(p: Problem, pairs, native):
    whole = p.run(native)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_BLOCK_PAIRS", pairs)
        parts = p.run(native)
    eps = torch.finfo(p.z.dtype).eps
    assert abs(whole[0] - parts[0]) <= 2 * p.rounding(p.z.dtype)
    for x, a, b in zip(p.rows(), whole[1:], parts[1:]):
        off = ((a - b).double() * lengths(x))[lengths(x)[:, 0] * torch.finfo(x.dtype).max > 1e6]
        assert off.norm() <= 4 / p.temperature * (eps + p.rounding(x.dtype))
