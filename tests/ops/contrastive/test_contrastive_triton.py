"""Triton's own: lists without room, windows of columns, both routes of the dense gradient."""

from __future__ import annotations

import pytest
import torch

from hpkernels import tuning
from hpkernels.common.bits import pack
from hpkernels.ops.contrastive import workspace
from hpkernels.ops.contrastive.triton import columns, lists
from tests.guard import before_guard_page
from tests.ops.contrastive.problems import check, problem_of

OP = "contrastive"


@pytest.mark.parametrize("first, end", [(0, 80), (17, 40)])
def test_sparse_lists_without_room_are_lists_of_blocks(kernels, way, first, end, dtype, monkeypatch):
    """Some of the lists: there is room for 64 columns each, on average, and every second row of M has none."""
    monkeypatch.setattr(lists, "_POOL_SHARES", (0.0, 0.0))
    problem = problem_of(80, 16, streams=1, negative_rows=10, rate=0.95, density=0.3, symmetric=False)
    check(kernels, way, problem, "sparse", dtype, [(first, end)])


def test_sparse_work_grows_with_the_pairs(kernels, monkeypatch):
    """Tiles of a list: those of its columns where it finds room, else those of the blocks that have one."""
    monkeypatch.setattr(lists, "_POOL_SHARES", (0.0, 0.0))
    n = 1000
    for columns_of_list in (range(0, n, 50), range(300, 400), range(n)):
        bits = torch.zeros(16, n, dtype=torch.bool)
        bits[3, columns_of_list] = True
        found = lists.positive_lists(n, pack(bits))
        blocks = {column // 64 for column in columns_of_list}
        listed = found.counts.abs().item()
        assert listed == (
            len(columns_of_list) if len(columns_of_list) <= 64 else sum(min(64, n - 64 * b) for b in blocks)
        )


@pytest.mark.cases("rate", [0.1, 0.9])
def test_sparse_windows_share_the_workspace(kernels, way, rate, dtype, monkeypatch):
    monkeypatch.setattr(columns, "WINDOW_BYTES", 1)
    monkeypatch.setattr(columns, "_SUM_ITEMS", 2)
    problem = problem_of(60, 16, streams=1, negative_rows=6, rate=rate, extra=False, temperature=0.5)
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
