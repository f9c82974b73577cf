"""The statistics of the dense denominator over the upper triangle, in Triton: regions, their edges, and their parts."""

from __future__ import annotations

import pytest
import torch

from hpkernels import tuning
from hpkernels.ops.contrastive.triton import dense
from tests.guard import before_guard_page
from tests.ops.contrastive.problems import Problem, problem_of

OP = "contrastive"
CONFIG = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
pytestmark = pytest.mark.only("interpreter")


@pytest.fixture(params=[(32, 32), (32, 64), (64, 32)], ids=str)
def tile(request):
    config = CONFIG | dict(zip(("BLOCK_M", "BLOCK_N"), request.param, strict=True))
    with (
        tuning.forced("contrastive_stats_triangle", config),
        tuning.forced("contrastive_stats_triangle_masked", config),
    ):
        yield request.param


def near(kernels, problem, denominator):
    x = problem.x.float()
    found, again = (kernels.contrastive_stats(x, problem.masks(denominator), problem.temperature) for _ in range(2))
    for ours, repeated, oracle in zip(found, again, problem.stats(x.double(), denominator), strict=True):
        assert torch.equal(ours, repeated)
        assert ((ours - oracle).abs() < 1e-6 * max(1 / problem.temperature, oracle.abs().max())).all()


@pytest.mark.parametrize("n, options", [
    (1, dict(negative_rows=1)),
    (31, dict(extra=False)),
    (97, dict(negative_rows=97, symmetric=False)),  # one row beyond three tiles
    (129, dict(negative_rows=43, extra=False, symmetric=False)),
    (150, dict(negative_rows=3, rate=0.5)),  # fewer token positions than bits of a word
    (130, dict(density=1.0, rate=1.0, negative_rows=65, streams=3)),
], ids=lambda value: str(value) if isinstance(value, int) else None)  # fmt: skip
@pytest.mark.parametrize("denominator", ["all", "dense"])
def test_regions_of_one_tile(kernels, tile, denominator, n, options):
    near(kernels, problem_of(n, 16, **options), denominator)


@pytest.mark.parametrize("denominator", ["all", "dense"])
@pytest.mark.parametrize("n, parts", [(129, 1 << 30), (129, 0), (230, 40000), (224, 40000)])
def test_regions_of_several_tiles(kernels, tile, denominator, n, parts, monkeypatch):
    """Bounded parts make the regions larger: sums of rows and of columns are carried over their tiles."""
    monkeypatch.setattr(dense, "PARTS_BYTES", parts)
    near(kernels, Problem(n, 20, streams=1, negative_rows=n // (3 if n % 3 == 0 else 2), symmetric=False), denominator)


def test_parts_are_bounded(monkeypatch):
    """At the paper's shape on a GPU of 132 processors, and where the bound would leave processors idle."""
    monkeypatch.setattr(dense, "processor_count", lambda device: 132)
    for n, largest in ((50_176, 32 << 20), (200_704, 256 << 20)):
        side = dense._region_side(n, 2, 3, 128, torch.device("cpu"))
        assert 3 * -(-n // side) * 2 * n * 4 <= largest
        assert dense._pairs(n, side) * 2 >= 4 * 132


@pytest.mark.parametrize("denominator", ["all", "dense"])
def test_no_operand_is_read_past_its_end(kernels, tile, denominator):
    problem = problem_of(128, 16, streams=1, negative_rows=4, symmetric=False)
    masks = problem.masks(denominator).map(before_guard_page)
    stats = kernels.contrastive_stats(before_guard_page(problem.x.float()), masks, 0.5)
    assert all(table.isfinite().all() for table in stats)


def test_ranges_and_small_temperatures_sweep_all_tiles(kernels, monkeypatch):
    problem = problem_of(40, 16, negative_rows=10)
    monkeypatch.setattr(dense, "_stats_of_triangle", None)
    kernels.contrastive_stats(problem.x.float(), problem.masks("all", 0, 39), 0.8)
    kernels.contrastive_stats(problem.x.float(), problem.masks("all"), 0.02)
