"""The contrastive statistics and gradient against the direct N x N formulas in fp64."""

from __future__ import annotations

import pytest
import torch

from hpkernels.common.bits import pack, unpack
from hpkernels.ops.contrastive import reference
from hpkernels.ops.contrastive.masks import Masks
from tests import poison
from tests.ops.contrastive.problems import DENOMINATORS, Problem, check, problem_of, ranges_between
from tests.ops.shapes import EVERY

OP = "contrastive"
FP32, FP64 = torch.float32, torch.float64
DTYPES = {"reference": (FP32, FP64), "cpu": (FP32, FP64)}  # normalised rows are no 16-bit ones on a CPU
denominators = pytest.mark.parametrize("denominator", DENOMINATORS)


def every_denominator(*sizes):
    return [(n, depth, dtype, denominator) for n, depth, dtype in sizes for denominator in DENOMINATORS]


def with_dtypes(sizes, *dtypes):
    return every_denominator(*((n, depth, dtype) for n, depth in sizes for dtype in dtypes))


SIZES = [(1, 16), (2, 1), (2, 7), (63, 48), (65, 520), (66, 40), (129, 16), (132, 72), (196, 48)]


@pytest.mark.cases(
    "n, depth, dtype, denominator",
    reference=with_dtypes(SIZES, FP32, FP64),
    cpu=with_dtypes(SIZES, FP32, FP64),
    # The last: more columns of x than a panel sums.
    cuda=with_dtypes([(1, 16), (2, 7), (66, 40), (132, 72), (6, 530)], torch.bfloat16, torch.float16, FP32),
    triton=[
        pytest.param(*size, denominator, marks=marks, id=f"{label}-{denominator}")
        for size, marks, label in EVERY
        for denominator in DENOMINATORS[:3]
        if size[0] < 784 or denominator == "all"  # minutes under the interpreter; same code as for 196 rows
    ],
)
def test_sizes(kernels, way, n, depth, dtype, denominator):
    options = {}
    if way.backend in ("cuda", "triton"):
        period = next(rows for rows in (28, 21, 13, 43, 6, 2, 1) if n % rows == 0)
        rate = 0.04 if way.name == "interpreter" and denominator == "sparse" else 0.3
        options = dict(streams=1, negative_rows=period, rate=rate, symmetric=n % 2 == 1, extra=depth not in (40, 48))
    check(kernels, way, problem_of(n, depth, **options), denominator, dtype)


@denominators
@pytest.mark.cases(
    "n, depth, streams, symmetric, temperature, dtype",
    **{
        backend: [
            (n, depth, streams, symmetric, temperature, dtype)
            for n, depth, streams in ((65, 48, 2), (129, 16, 1))
            for symmetric in (True, False)
            for temperature in (0.07, 0.025, 0.01)
            for dtype in (FP32, FP64)
        ]
        for backend in ("reference", "cpu")
    },
    cuda=[(66, 16, 2, True, temperature, FP32) for temperature in (0.01, 0.03, 0.07)],
    triton=[(66, 16, 2, True, temperature, FP32) for temperature in (0.01, 0.07)],
)
def test_temperatures(kernels, way, n, depth, streams, symmetric, temperature, dtype, denominator, processors):
    if way.backend == "triton":
        processors(8)
    options = {"negative_rows": 11} if way.backend in ("cuda", "triton") else {}
    problem = problem_of(n, depth, temperature=temperature, symmetric=symmetric, streams=streams, **options)
    check(kernels, way, problem, denominator, dtype)


FULL = (33, dict(density=1.0, rate=1.0, negative_rows=11, streams=1))  # all pairs positive, the diagonals set


@denominators
@pytest.mark.cases(
    "n, options",
    [FULL],
    cpu=[
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
    ],
)
def test_masks(kernels, way, n, options, dtype, denominator):
    problem = problem_of(n, 16 if n == 33 else 24, **options)
    check(kernels, way, problem, denominator, dtype)


def panels(n, depth, cuts, **options):
    return n, depth, ranges_between(cuts, n), options


def one_range(n, first, anchors, **options):
    return n, 16, ((first, first + anchors),), options


@denominators
@pytest.mark.cases(
    "n, depth, ranges, options",
    cpu=[
        panels(2, 1, (1,)),
        panels(65, 520, (0, 33, 64)),
        panels(129, 16, (1, 128, 128), temperature=0.01),
        panels(195, 20, (64,), negative_rows=65, rate=0.5, symmetric=False, temperature=0.025),
        panels(196, 24, (100,), negative_rows=1),
        panels(196, 24, (30, 130), negative_rows=4, extra=False, symmetric=False, rate=0.05),
        panels(450, 48, (7, 400), negative_rows=450, rate=0.9, density=0.5, streams=1),
        panels(1300, 16, (600,), negative_rows=13, rate=0.3, density=0.03),
    ],
    reference=[panels(65, 520, (0, 33, 64)), panels(129, 16, (1, 128, 128), temperature=0.01)],
    cuda=[
        one_range(150, first, anchors, negative_rows=15, rate=0.3, symmetric=False)
        for first, anchors in [(0, 17), (37, 101), (130, 3), (32, 0)]
    ],
    triton=[
        one_range(80, first, anchors, negative_rows=20, symmetric=False)
        for first, anchors in [(0, 17), (17, 40), (33, 47), (79, 1), (32, 0)]
    ],
)
def test_ranges_of_anchors(kernels, way, n, depth, ranges, options, denominator, processors):
    if way.backend == "triton":
        processors(8)
    for dtype in DTYPES.get(way.backend, (FP32,)):
        check(kernels, way, problem_of(n, depth, **options), denominator, dtype, ranges)


@pytest.mark.parametrize("denominator", ["dense", "sparse"])
@pytest.mark.only("reference", "cpu")
def test_without_negatives_the_denominator_is_p(kernels, way, denominator, dtype):
    problem = Problem(100, 20)
    problem.M = None
    check(kernels, way, problem, denominator, dtype)
    check(kernels, way, problem, denominator, dtype, ranges_between((40,), 100))


@denominators
@pytest.mark.parametrize("temperature", [0.8, 0.01])
def test_no_pairs_at_all(kernels, temperature, denominator):
    problem = Problem(40, 16, density=0.0, rate=0.0, temperature=temperature, negative_rows=10)
    x, masks = problem.x.float(), problem.masks(denominator)
    lse, pos, ext = kernels.contrastive_stats(x, masks, temperature)
    assert not pos.any() and not ext.any()
    assert (lse != 0).all() if denominator == "all" else not lse.any()
    grad = kernels.contrastive_grad(x, masks, temperature, lse, *torch.ones(3, *lse.shape))
    assert grad.isfinite().all() and (denominator == "all" or not grad.any())


@denominators
def test_gradient_through_zero_tables_is_zero(kernels, denominator):
    problem = problem_of(65, 48, negative_rows=13)
    masks, tables = problem.masks(denominator), torch.zeros(3, 2, 65)
    lse = problem.plain(denominator, FP32, FP64)[0][0].float()
    assert not kernels.contrastive_grad(problem.x.float(), masks, problem.temperature, lse, *tables).any()


@denominators
@pytest.mark.only("reference", "cuda", "triton")
def test_not_a_number_shows(kernels, denominator):
    """Where nothing can be raised, and where the op looks at numbers first."""
    n = 40
    x, full = problem_of(n, 16).x[:1].float(), pack(torch.ones(n, n, dtype=torch.bool))
    x[0, 7, 3] = torch.nan
    negatives = pack(torch.zeros(10, n, dtype=torch.bool)) if denominator in ("dense", "sparse") else None
    masks = Masks(full, negatives=negatives, denominator="sparse" if denominator == "P alone" else denominator)
    assert kernels.contrastive_stats(x, masks, 0.5)[0].isnan().all()


@pytest.mark.parametrize("denominator", ["dense", "sparse"])
def test_the_diagonal_never_counts(kernels, denominator):
    x = problem_of(33, 16).x[:1].float()
    diagonal, bare = pack(torch.eye(33, dtype=torch.bool)), pack(torch.zeros(33, 33, dtype=torch.bool))
    table = pack(torch.ones(11, 33, dtype=torch.bool))
    with_it, without = (
        kernels.contrastive_stats(x, Masks(P, None, P, None, table, denominator), 0.5) for P in (diagonal, bare)
    )
    for a, b in zip(with_it, without, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.only("cuda")
@pytest.mark.parametrize("denominator", ["dense", "sparse"])
def test_errors_are_at_most_twice_those_of_torch(kernels, denominator, dtype):
    """Plain torch on the same operands: G in fp32 and, for 16-bit x, rounded to x's dtype for the product."""
    problem = problem_of(260, 64, streams=1, negative_rows=4, temperature=0.1)
    x, masks, temperature, tables = problem.x.to(dtype), problem.masks(denominator), 0.1, torch.randn(3, 1, 260)
    exact = reference.contrastive_stats(x.double(), masks, temperature)
    plain = reference.contrastive_stats(x.float(), masks, temperature)
    stats = kernels.contrastive_stats(x, masks, temperature)
    for ours, torch_s, oracle in zip(stats, plain, exact, strict=True):
        assert (ours - oracle).norm() <= 2 * (torch_s - oracle).norm()
    lse = exact[0].float()
    grad = kernels.contrastive_grad(x, masks, temperature, lse, *tables)
    oracle = reference.contrastive_grad(x.double(), masks, temperature, exact[0], *tables.double())
    P, Q, M = (unpack(mask, 260) for mask in (masks.positives, masks.extra, masks.negatives))
    values = x[0].float()
    p = (P | M.repeat(65, 1)) * torch.exp(values @ values.T / temperature - lse.T)
    G = tables[0].T * p + tables[1].T * P + tables[2].T * Q
    G = (G + G.T).fill_diagonal_(0).to(dtype)
    plain = (G.float() @ values / temperature).to(dtype)
    assert (grad - oracle).norm() <= 2 * (plain - oracle).norm()


def run(kernels, problem, denominator, dtype, cuts):
    """All tables of all ranges that end at `cuts`."""
    x, tables, whole = problem.x.to(dtype), problem.grads.to(dtype), problem.masks(denominator)
    lse = kernels.contrastive_stats(x, whole, problem.temperature)[0]
    found = []
    for anchors in ranges_between(cuts, x.shape[1]):
        part = problem.masks(denominator, *anchors)
        found += kernels.contrastive_stats(x, part, problem.temperature)
        found.append(kernels.contrastive_grad(x, part, problem.temperature, lse, *tables))
    return found


@pytest.mark.only("cpu")
@denominators
@pytest.mark.parametrize("temperature", [0.8, 0.01])
@pytest.mark.parametrize("cuts", [(), (300,)], ids=str)
def test_thread_counts_agree_bitwise(kernels, cuts, temperature, denominator, dtype, same_for_all_threads):
    problem = problem_of(700, 40, negative_rows=70, temperature=temperature, density=0.02, rate=0.05)
    same_for_all_threads(lambda: run(kernels, problem, denominator, dtype, cuts), (1, 2, 3, 1))


@pytest.mark.only("cpu")
@denominators
@pytest.mark.parametrize("cuts", [(), (50,)], ids=str)
def test_unset_memory_is_never_used(kernels, cuts, denominator, dtype):
    """The same bits when all scratch memory starts as NaN."""
    problem, results = problem_of(129, 20, negative_rows=43, symmetric=False, rate=0.05), []
    for on in (False, True):
        with poison.filled(on):
            results.append(run(kernels, problem, denominator, dtype, cuts))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.only("cpu")
def test_dense_and_sparse_agree(kernels):
    problem = Problem(588, 64, negative_rows=196, rate=0.05, density=0.02)
    dense, sparse = (run(kernels, problem, denominator, FP32, ()) for denominator in ("dense", "sparse"))
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(dense, sparse))
