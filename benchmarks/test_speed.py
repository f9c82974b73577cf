"""pytest-benchmark cases on small shapes: `pytest benchmarks`. Compare two commits with --benchmark-save and -compare.

The figures to quote come from `python -m benchmarks`, which gives every contender a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.plan import CEILINGS, Shape

SMALL = Shape(images=2, grid=(14, 14), channels=96, code=128, pool=512, heads=3)
CONTENDERS = [(case, name) for case in CASES if case not in CEILINGS for name in CASES[case].contenders]


@pytest.mark.parametrize(("case", "contender"), CONTENDERS, ids=lambda value: value)
def test_speed(benchmark, case: str, contender: str) -> None:
    inputs = CASES[case].inputs(SMALL, "cpu", torch.float32)
    benchmark.group = case
    benchmark(CASES[case].contenders[contender], inputs)
