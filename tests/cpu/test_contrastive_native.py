"""The contrastive statistics and gradient on the CPU against the direct N x N formulas in fp64."""

import functools

import numpy as np
import pytest
import torch

from hpkernels import _cpu
from hpkernels.ops.contrastive import cpu as native
from hpkernels.ops.contrastive.masks import Masks

SIZES = [(1, 16), (2, 1), (63, 48), (65, 520), (129, 16), (196, 48)]


@pytest.fixture
def isa(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


every_isa = pytest.mark.parametrize("isa", _cpu.isas(), indirect=True)


def pack(dense):
    rows, columns = dense.shape
    padded = np.zeros((rows, (columns + 127) // 128 * 128), dtype=bool)
    padded[:, :columns] = dense.numpy()
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


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
        self.grads = torch.randn(3, streams, n, generator=g, dtype=torch.float64)
        self.grads[:, :, 1::3] = 0

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

    def masks(self):
        """positives, positives_t, extra, extra_t, negatives as bits."""
        bits = []
        for mask in (self.P, self.Q):
            bits.append(None if mask is None else pack(mask))
            bits.append(None if mask is None or self.symmetric else pack(mask.T.contiguous()))
        return [*bits, None if self.M is None else pack(self.M)]

    def logits(self, x):
        return x @ x.transpose(1, 2) / self.temperature

    def dense(self, denominator):
        n = self.x.shape[1]
        off = ~torch.eye(n, dtype=torch.bool)
        P = self.P & off
        Q = None if self.Q is None else self.Q & off
        E = off if denominator == "all" else P
        if denominator != "all" and self.M is not None:
            E = (P | self.M.repeat(n // self.M.shape[0], 1)) & off
        return E, P, Q

    def stats(self, x, denominator):
        """Plain torch in x's dtype, differentiable."""
        E, P, Q = self.dense(denominator)
        logits = self.logits(x)
        empty = ~E.any(1)
        lse = torch.where(E, logits, -torch.inf).masked_fill(empty[:, None], 0.0).logsumexp(2).masked_fill(empty, 0.0)
        pos = (logits * P).sum(2)
        return lse, pos, (logits * Q).sum(2) if Q is not None else torch.zeros_like(pos)

    def gradient(self, denominator, dtype=torch.float64):
        x = self.x.to(dtype, copy=True).requires_grad_()
        stats = self.stats(x, denominator)
        sum((s * g.to(dtype)).sum() for s, g in zip(stats, self.grads)).backward()
        return x.grad

    @functools.cache  # noqa: B019 (kept as long as its problem, by design: instruction sets share the oracle)
    def oracle(self, denominator):
        """Statistics and gradient in fp64, and what plain torch makes of them in fp32."""
        return tuple(
            (self.stats(self.x.to(dtype), denominator), self.gradient(denominator, dtype))
            for dtype in (torch.float64, torch.float32)
        )

    def native_masks(self, denominator, anchors):
        *masks, negatives = self.masks()
        chosen = [None if mask is None else mask[anchors] for mask in masks]
        return Masks(*chosen, None if denominator == "all" else negatives, denominator, anchors.start)

    def native_stats(self, denominator, dtype, cuts=()):
        """Of all anchors at once, or of ranges of them that end at `cuts`, one behind the other."""
        parts = []
        for anchors in self.ranges(cuts):
            masks = self.native_masks(denominator, anchors)
            x = self.x.to(dtype)
            parts.append(native.contrastive_stats(x, masks, self.temperature))
            assert all(part.shape == (len(x), anchors.stop - anchors.start) for part in parts[-1])
        return tuple(torch.cat(tables, 1) for tables in zip(*parts))

    def native_gradient(self, denominator, dtype, lse, cuts=()):
        parts, grads = [], self.grads.to(dtype)
        for anchors in self.ranges(cuts):
            masks = self.native_masks(denominator, anchors)
            x = self.x.to(dtype)
            parts.append(native.contrastive_grad(x, masks, self.temperature, lse, *grads))
        return torch.cat(parts, 1)

    def ranges(self, cuts):
        ends = [*cuts, self.x.shape[1]]
        return [slice(first, end) for first, end in zip([0, *ends], ends)]

    def check(self, denominator, cuts=()):
        (expected, expected_grad), (plain, plain_grad) = self.oracle(denominator)
        scale = expected_grad.abs().max().clamp_min(1e-300)

        stats = self.native_stats(denominator, torch.float64, cuts)
        for ours, oracle in zip(stats, expected):
            assert ours.dtype == torch.float64
            assert (ours - oracle).abs().max() <= 1e-12 * (1 + oracle.abs().max())
        grad = self.native_gradient(denominator, torch.float64, stats[0], cuts)
        assert (grad - expected_grad).abs().max() <= 1e-10 * scale

        stats = self.native_stats(denominator, torch.float32, cuts)
        for ours, theirs, oracle in zip(stats, plain, expected):
            assert ours.dtype == torch.float32
            floor = 2e-7 * (1 + oracle.abs().max())
            assert (ours - oracle).abs().max() <= 2 * (theirs - oracle).abs().max() + floor
        grad = self.native_gradient(denominator, torch.float32, stats[0], cuts)
        plain_error = (plain_grad - expected_grad).abs().max()
        assert (grad - expected_grad).abs().max() <= 2 * plain_error + 2e-7 * scale


@functools.cache
def problem_of(n, depth, **options):
    return Problem(n, depth, **options)


@every_isa
@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
@pytest.mark.parametrize("n, depth", SIZES)
def test_sizes(isa, n, depth, denominator):
    problem_of(n, depth).check(denominator)


@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
@pytest.mark.parametrize("temperature", [0.07, 0.025, 0.01])
@pytest.mark.parametrize("symmetric", [True, False])
@every_isa
def test_temperatures_and_asymmetric_masks(isa, symmetric, temperature, denominator):
    problem_of(65, 48, temperature=temperature, symmetric=symmetric).check(denominator)
    problem_of(129, 16, temperature=temperature, symmetric=symmetric, streams=1).check(denominator)


@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
@pytest.mark.parametrize("n, options", [
    (129, dict(density=1.0, rate=1.0, streams=1)),
    (65, dict(density=1.0, rate=1.0, symmetric=False)),
    (65, dict(density=0.0)),
    (63, dict(density=0.0, rate=0.0)),
    (196, dict(negative_rows=28, streams=3)),
    (196, dict(negative_rows=1)),
    (196, dict(negative_rows=98, rate=0.02, density=0.01)),
    (196, dict(negative_rows=49, extra=False)),
    (196, dict(negative_rows=4, extra=False, symmetric=False, rate=0.05)),
    (195, dict(negative_rows=65, rate=0.5)),
    (450, dict(negative_rows=45, rate=0.1, density=0.03)),
    (450, dict(negative_rows=450, rate=0.9, density=0.5, streams=1)),
])  # fmt: skip
def test_masks(n, options, denominator):
    Problem(n, 24, **options).check(denominator)


@every_isa
@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
@pytest.mark.parametrize("n, depth, cuts, options", [
    (2, 1, (1,), {}),
    (65, 520, (0, 33, 64), {}),
    (129, 16, (1, 128, 128), dict(temperature=0.01)),
    (195, 20, (64,), dict(negative_rows=65, rate=0.5, symmetric=False, temperature=0.025)),
    (196, 24, (100,), dict(negative_rows=1)),
    (196, 24, (30, 130), dict(negative_rows=4, extra=False, symmetric=False, rate=0.05)),
    (450, 48, (7, 400), dict(negative_rows=450, rate=0.9, density=0.5, streams=1)),
    (1300, 16, (600,), dict(negative_rows=13, rate=0.3, density=0.03)),
])  # fmt: skip
def test_ranges_of_anchors(isa, n, depth, cuts, options, denominator):
    problem_of(n, depth, **options).check(denominator, cuts)


@pytest.mark.parametrize("denominator", ["dense", "sparse"])
def test_without_negatives_the_denominator_is_p(denominator):
    problem = Problem(100, 20)
    problem.M = None
    problem.check(denominator)
    problem.check(denominator, cuts=(40,))


@pytest.mark.parametrize("temperature", [0.8, 0.01])
@pytest.mark.parametrize("negatives", [True, False])
def test_no_pairs_at_all(negatives, temperature):
    problem = Problem(40, 16, density=0.0, rate=0.0, temperature=temperature)
    if not negatives:
        problem.M = None
    for denominator in ("dense", "sparse"):
        stats = problem.native_stats(denominator, torch.float32)
        assert not any(s.any() for s in stats)
        assert not problem.native_gradient(denominator, torch.float32, stats[0]).any()


def test_gradient_through_zero_tables_is_zero():
    problem = Problem(65, 48)
    problem.grads.zero_()
    for denominator in ("all", "dense", "sparse"):
        lse = problem.native_stats(denominator, torch.float32)[0]
        assert not problem.native_gradient(denominator, torch.float32, lse).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
@pytest.mark.parametrize("temperature", [0.8, 0.01])
@pytest.mark.parametrize("cuts", [(), (300,)])
@every_isa
def test_thread_counts_agree_bitwise(isa, cuts, temperature, denominator, dtype):
    problem = Problem(700, 40, negative_rows=70, temperature=temperature, density=0.02, rate=0.05)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        stats = problem.native_stats(denominator, dtype, cuts)
        results.append([*stats, problem.native_gradient(denominator, dtype, stats[0], cuts)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
@pytest.mark.parametrize("cuts", [(), (50,)])
@every_isa
def test_unset_memory_is_never_used(isa, cuts, denominator, dtype):
    """The same bits when all scratch memory starts as NaN."""
    problem = Problem(129, 20, negative_rows=43, symmetric=False, rate=0.05)
    results = []
    for poison in (False, True):
        _cpu.poison_memory(poison)
        try:
            stats = problem.native_stats(denominator, dtype, cuts)
            results.append([*stats, problem.native_gradient(denominator, dtype, stats[0], cuts)])
        finally:
            _cpu.poison_memory(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_dense_and_sparse_agree():
    problem = Problem(588, 64, negative_rows=196, rate=0.05, density=0.02)
    dense, sparse = (problem.native_stats(d, torch.float32) for d in ("dense", "sparse"))
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(dense, sparse))
    a, b = (problem.native_gradient(d, torch.float32, dense[0]) for d in ("dense", "sparse"))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
