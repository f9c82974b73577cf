"""The CUDA kernels' own: long lists, workspaces that are full, ends of operands."""

from __future__ import annotations

import pytest
import torch

from hpkernels import tuning
from hpkernels.common.bits import pack
from hpkernels.ops.contrastive import reference, workspace
from hpkernels.ops.contrastive.masks import Masks
from tests.guard import before_guard_page
from tests.ops.contrastive.problems import check, problem_of

OP = "contrastive"
pytestmark = pytest.mark.only("host-cuda")


def test_lists_of_several_tiles(kernels):
    """Several panels, tiles of columns, tiles of rows that share a list; lists beyond the room of one filling."""
    n, rows = 4250, slice(4101, 4171)
    x = problem_of(n, 8, streams=1, density=0, rate=0).x.float()
    dense = torch.rand(n, n) < 0.02
    negatives = pack(torch.rand(2, n) < 0.999)
    whole = Masks(pack(dense), pack(dense.T.contiguous()), None, None, negatives, "sparse")
    part = Masks(*(None if mask is None else mask[rows] for mask in whole[:4]), negatives, "sparse", rows.start)
    exact = reference.contrastive_stats(x.double(), whole, 0.5)
    for ours, oracle in zip(kernels.contrastive_stats(x, part, 0.5), exact, strict=True):
        assert ((ours - oracle[:, rows]).abs() < 1e-6 * max(2, oracle.abs().max())).all()
    tables = 1e-4 * torch.randn(3, 1, n)
    tables[:, :, ::3] = 0
    oracle = reference.contrastive_grad(x.double(), part, 0.5, exact[0], *tables.double())
    with tuning.forced("contrastive_grad", {"route": "lists"}):
        grad, again = (kernels.contrastive_grad(x, part, 0.5, exact[0].float(), *tables) for _ in range(2))
    assert (grad - oracle).norm() <= 4e-6 * oracle.norm() and torch.equal(grad, again)


def test_windows_share_the_workspace(kernels, way, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1)
    problem = problem_of(66, 24, streams=1, negative_rows=6, rate=0.3, extra=False, temperature=0.5)
    check(kernels, way, problem, "sparse", torch.float32, [(3, 23)])


def test_a_column_side_that_finds_no_room_is_summed_from_the_bits(kernels, way, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_column_capacity", lambda period, n: period)
    problem = problem_of(70, 16, streams=1, negative_rows=5, rate=0.5, symmetric=False, temperature=0.5)
    check(kernels, way, problem, "sparse", dtype)


def test_blocks_of_the_workspace(kernels, way, dtype, monkeypatch):
    """Several, the first of them beginning before the anchors."""
    monkeypatch.setattr(workspace, "WEIGHTS_BYTES", 0)
    problem = problem_of(150, 24, streams=1, negative_rows=50, symmetric=False, temperature=0.5)
    check(kernels, way, problem, "dense", dtype, [(37, 138)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
def test_no_operand_is_read_past_its_end(kernels, denominator, dtype):
    problem = problem_of(132, 24, streams=1, negative_rows=4, symmetric=False)
    part = problem.masks(denominator, 61, 132).map(before_guard_page)  # the last anchor is the last row
    x = before_guard_page(problem.x.to(dtype))
    tables = [before_guard_page(torch.rand(1, 132)) for _ in range(4)]
    expected = reference.contrastive_stats(x.double(), part, 0.5)
    stats = kernels.contrastive_stats(x, part, 0.5)
    for ours, oracle in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.double(), oracle, atol=1e-4, rtol=0)
    for route in ("fused", "workspace"):
        with tuning.forced("contrastive_grad", {"route": route}):
            grad = kernels.contrastive_grad(x, part, 0.5, *tables)
        assert grad.shape == (1, 71, 24) and grad.isfinite().all()
