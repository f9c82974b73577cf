"""The dense kernels of the CPU where small problems do not reach: teams of panels, rows of tiles without positives."""

from __future__ import annotations

import pytest
import torch

from tests.ops.contrastive.problems import check, problem_of

OP = "contrastive"
DTYPES = {"cpu": (torch.float32, torch.float64)}
PANEL, TEAM = 192, 4  # of csrc/cpu/contrastive

pytestmark = pytest.mark.only("cpu")


@pytest.mark.parametrize("n", [TEAM * PANEL + 1, 7 * PANEL, 9 * PANEL - 40])  # two teams with gaps, two, three
def test_teams_of_panels(kernels, way, n, dtype):
    check(kernels, way, problem_of(n, 9, streams=1, density=0.01), "all", dtype)


@pytest.mark.parametrize("denominator", ["all", "dense"])
def test_teams_of_panels_agree_bitwise_for_all_threads(kernels, denominator, dtype, same_for_all_threads):
    problem = problem_of(9 * PANEL - 40, 9, streams=1, density=0.01)
    x, tables, masks = problem.x.to(dtype), problem.grads.to(dtype), problem.masks(denominator)

    def step():
        stats = kernels.contrastive_stats(x, masks, problem.temperature)
        return *stats, kernels.contrastive_grad(x, masks, problem.temperature, stats[0], *tables)

    same_for_all_threads(step, (1, 2, 3, 16, 1))


@pytest.mark.parametrize("temperature", [0.8, 0.01])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("density", [0, 5e-4])
def test_rows_of_tiles_without_positives(kernels, way, density, symmetric, temperature, dtype):
    problem = problem_of(3 * PANEL - 50, 24, density=density, symmetric=symmetric, temperature=temperature)
    check(kernels, way, problem, "all", dtype)
