"""Contrastive problems, their direct N x N formulas in torch, and how near a backend has to come."""

from __future__ import annotations

import contextlib
import functools

import torch

from hpkernels import tuning
from hpkernels.common.bits import pack
from hpkernels.ops.contrastive.masks import Masks

DENOMINATORS = ("all", "dense", "sparse", "P alone")  # the last: sparse, without negatives


class Problem:
    """Random unit rows and masks: bool (N, N) positives and extra, (R, N) negatives; some rows without any bit."""

    def __init__(self, n, depth, *, streams=2, negative_rows=None, density=0.1, rate=0.2, symmetric=True, extra=True,
                 temperature=0.8, seed=0):  # fmt: skip
        g = torch.Generator().manual_seed(seed + n)
        x = torch.randn(streams, n, depth, generator=g, dtype=torch.float64)
        if depth > 1:  # neighbours alike, as in images: the logits are far from zero
            x = x + x.roll(1, 1) + 2 * x[:, :1]
        self.x = torch.nn.functional.normalize(x, dim=-1)
        self.temperature = temperature
        self.P, self.Q = (self._pairs(n, density, symmetric, g) for _ in range(2))
        self.Q = self.Q if extra else None
        self.symmetric = symmetric
        rows = negative_rows or (n // 3 if n % 3 == 0 else n)
        self.M = torch.rand(rows, n, generator=g) < rate
        self.M[:: 2 if rate < 1 else rows + 1] = rate >= 1
        self.grads = 1e-4 * torch.randn(3, streams, n, generator=g, dtype=torch.float64)
        self.grads[:, :, 1::3] = 0  # rows without a gradient are common

    @staticmethod
    def _pairs(n, density, symmetric, g):
        dense = torch.rand(n, n, generator=g) < density
        if symmetric:
            dense |= dense.T.clone()
        if density < 1:
            dense[::4] = False
            if symmetric:
                dense[:, ::4] = False
        return dense  # with diagonal bits, which the kernels ignore

    def masks(self, denominator, first=0, end=None):
        """As bits, of the anchors first ... end."""
        bits = []
        for mask in (self.P, self.Q):
            turned = None if mask is None or self.symmetric else mask.T
            bits += [None if m is None else pack(m[first:end].contiguous()) for m in (mask, turned)]
        negatives = None if denominator in ("all", "P alone") or self.M is None else pack(self.M)
        return Masks(*bits, negatives, "sparse" if denominator == "P alone" else denominator, first)

    def dense(self, denominator):
        n = self.x.shape[1]
        off = ~torch.eye(n, dtype=torch.bool)
        P = self.P & off
        Q = None if self.Q is None else self.Q & off
        E = off if denominator == "all" else P
        if denominator in ("dense", "sparse") and self.M is not None:
            E = (P | self.M.repeat(n // self.M.shape[0], 1)) & off
        return E, P, Q

    def stats(self, x, denominator):
        """Plain torch in x's dtype, differentiable."""
        E, P, Q = self.dense(denominator)
        logits = x @ x.transpose(1, 2) / self.temperature
        empty = ~E.any(1)
        lse = torch.where(E, logits, -torch.inf).masked_fill(empty[:, None], 0.0).logsumexp(2).masked_fill(empty, 0.0)
        pos = (logits * P).sum(2)
        return lse, pos, (logits * Q).sum(2) if Q is not None else torch.zeros_like(pos)

    @functools.cache  # noqa: B019 (kept as long as its problem, by design: instruction sets share the oracle)
    def plain(self, denominator, dtype, working):
        """Statistics and gradient of x in dtype, in the working dtype."""
        x = self.x.to(dtype).to(working, copy=True).requires_grad_()
        stats = self.stats(x, denominator)
        sum((s * g.to(working)).sum() for s, g in zip(stats, self.grads)).backward()
        return tuple(s.detach() for s in stats), x.grad


@functools.cache
def problem_of(n, depth, **options):
    return Problem(n, depth, **options)


def ranges_between(cuts, n):
    """All anchors, in ranges that end at `cuts`."""
    ends = [*cuts, n]
    return tuple(zip([0, *ends], ends))


def check(kernels, way, problem, denominator, dtype, ranges=None):
    """Statistics and gradient against fp64, of all anchors or of ranges of them; twice the same bits."""
    n, x = problem.x.shape[1], problem.x.to(dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    ranges = ranges or [(0, n)]
    tables, lse = problem.grads.to(working), problem.plain(denominator, dtype, torch.float64)[0][0].to(working)
    if way.backend in ("reference", "cpu"):
        lse = kernels.contrastive_stats(x, problem.masks(denominator), problem.temperature)[0]
    routes = ("fused", "workspace") if way.backend == "cuda" and denominator in ("all", "dense") else (None,)
    for route in routes:
        parts = []
        for first, end in ranges:
            part = problem.masks(denominator, first, end)
            with tuning.forced("contrastive_grad", {"route": route}) if route else contextlib.nullcontext():
                found, *others = (
                    (
                        *kernels.contrastive_stats(x, part, problem.temperature),
                        kernels.contrastive_grad(x, part, problem.temperature, lse, *tables),
                    )
                    for _ in range(1 if way.name == "interpreter" and n > 66 else 2)
                )
            assert all(torch.equal(a, b) for again in others for a, b in zip(found, again, strict=True))
            assert all(table.dtype == working and table.shape == (len(x), end - first) for table in found[:3])
            assert found[3].dtype == dtype and found[3].shape == (len(x), end - first, x.shape[2])
            parts.append(found)
        anchors = torch.cat([torch.arange(*anchors) for anchors in ranges])
        if len(anchors):
            *stats, grad = (torch.cat(tables, 1) for tables in zip(*parts))
            near = _as_near_as_torch if way.backend in ("reference", "cpu") else _near_on_gpus
            near(stats, grad, problem, denominator, dtype, anchors, way)


def _as_near_as_torch(stats, grad, problem, denominator, dtype, anchors, way):
    expected, plain = (
        [tables[:, anchors] for tables in (*found[0], found[1])]
        for found in (problem.plain(denominator, dtype, working) for working in (torch.float64, torch.float32))
    )
    for ours, theirs, oracle in zip((*stats, grad), plain, expected, strict=True):
        difference, size = (ours - oracle).abs().max(), oracle.abs().max() + (oracle.ndim == 2)  # logits of size 1
        if dtype == torch.float64:
            assert difference <= (1e-12 if oracle.ndim == 2 else 1e-10) * size
        else:
            assert difference <= 2 * (theirs - oracle).abs().max() + 2e-7 * size


def _near_on_gpus(stats, grad, problem, denominator, dtype, anchors, way):
    expected, expected_grad = problem.plain(denominator, dtype, torch.float64)
    for ours, oracle in zip(stats, expected, strict=True):
        scale = max(1 / problem.temperature, oracle.abs().max())  # of the logits, and of the shift
        assert ((ours - oracle[:, anchors]).abs() < 1e-6 * scale).all()
    oracle = expected_grad[:, anchors]
    weights = {torch.float32: 4e-6 if way.backend == "cuda" else 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
    rounding = (oracle.to(dtype) - oracle).norm()  # of the result: small gradients are subnormal in fp16
    assert (grad - oracle).norm() <= weights[dtype] * oracle.norm() + 2 * rounding  # G is rounded to x's dtype
