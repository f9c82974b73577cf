"""pytest-benchmark cases on small shapes: `pytest benchmarks`. Compare two commits with --benchmark-save and -compare.

The figures to quote come from `python -m benchmarks`, which gives every contender a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import checks
from benchmarks.cases import KINDS
from benchmarks.plan import Shape

SMALL = Shape(images=2, grid=(14, 14), channels=96, code=128, pool=512, heads=3)
CONTENDERS = [
    (kind, peer)
    for kind in checks.GATES
    for peer in KINDS[kind].contenders
    if not peer.endswith("-compiled") and peer != "keops"
]


@pytest.mark.parametrize(("kind", "peer"), CONTENDERS, ids=lambda value: value)
def test_speed(benchmark, kind: str, peer: str) -> None:
    verdict = checks.gate(kind, peer, "cpu", torch.float32)
    if verdict["state"] != "ok":
        pytest.skip(verdict["reason"])
    inputs = KINDS[kind].inputs(SMALL, "cpu", torch.float32)
    benchmark.group = kind
    benchmark(KINDS[kind].contenders[peer], inputs)
