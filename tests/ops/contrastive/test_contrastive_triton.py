"""Triton's own: lists without room, windows, both routes of the dense gradient."""

from __future__ import annotations

import pytest
import torch

from hpkernels import tuning
from hpkernels.ops.contrastive import workspace
from hpkernels.ops.contrastive.triton import lists, sparse_grad
from tests.guard import before_guard_page
from tests.ops.contrastive.problems import check, problem_of

OP = "contrastive"


@pytest.mark.cases("rate", [0.1, 0.9])
def test_sparse_lists_that_find_no_room_are_walked(kernels, way, rate, dtype, monkeypatch):
    monkeypatch.setattr(lists, "_LIST_SHARE", (0, 1))
    monkeypatch.setattr(lists, "_LIST_MULTIPLE", 64)
    problem = problem_of(40, 16, streams=1, negative_rows=10, rate=rate, symmetric=False, temperature=0.5)
    check(kernels, way, problem, "sparse", dtype)


def test_sparse_windows_share_the_workspace(kernels, way, dtype, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(sparse_grad, "_SUM_PROGRAMS", 4)
    problem = problem_of(60, 16, streams=1, negative_rows=6, rate=0.1, extra=False, temperature=0.5)
    check(kernels, way, problem, "sparse", dtype)


@pytest.mark.parametrize("route", ["fused", "workspace"])
@pytest.mark.parametrize("first_row, n", [(0, 150), (37, 101)])
@pytest.mark.parametrize("temperature", [0.5, 0.04])
def test_routes_of_the_dense_gradient(kernels, way, route, first_row, n, temperature, dtype, monkeypatch):
    """Several blocks of the workspace, the first of them beginning before the anchors."""
    monkeypatch.setattr(workspace, "WEIGHTS_BYTES", 0)
    problem = problem_of(150, 24, negative_rows=50, symmetric=False, temperature=temperature)
    with tuning.forced("contrastive_grad", {"route": route}):
        check(kernels, way, problem, "dense", dtype, [(first_row, first_row + n)])


@pytest.mark.only("interpreter")
@pytest.mark.parametrize("route", ["fused", "workspace"])
@pytest.mark.parametrize("first_row", [0, 35, 127])
@pytest.mark.parametrize("denominator", ["all", "dense", "sparse"])
def test_no_operand_is_read_past_its_end(kernels, route, first_row, denominator):
    """Panels that start off a multiple of 128 rows reach past the last word of the negatives' last row."""
    n, depth = 128, 16
    problem = problem_of(n, depth, streams=1, negative_rows=4, symmetric=False)
    part = problem.masks(denominator, first_row, n).map(before_guard_page)
    x = before_guard_page(problem.x.float())
    tables = [before_guard_page(torch.rand(1, n)) for _ in range(4)]
    stats = kernels.contrastive_stats(x, part, 0.5)
    assert all(table.isfinite().all() for table in stats)
    with tuning.forced("contrastive_grad", {"route": route}):
        grad = kernels.contrastive_grad(x, part, 0.5, *tables)
    assert grad.shape == (1, n - first_row, depth) and grad.isfinite().all()
