"""The suites of the ops on Triton's kernels, under its interpreter on CPU tensors: one process an op, or part of it.

Directly: TRITON_INTERPRET=1 python -m pytest tests/ops tests/properties [-m slow]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [path.parent.name for path in sorted(ROOT.glob("hpkernels/ops/*/triton*")) if path.parent.name != "common"]
PARTS = {"contrastive": 3, "similarity_search": 2}  # of the long ones


def _runs() -> list[tuple[str, ...]]:
    ops = [(f"tests/ops/{op}", f"{i}/{PARTS.get(op, 1)}") for op in FOLDERS for i in range(1, 1 + PARTS.get(op, 1))]
    others = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/triton_kernels/interpreted/test_*.py"))]
    others += ["tests/ops/test_op_checks.py", "tests/properties"]
    return [run for run in ops if (ROOT / run[0]).exists()] + [(name, "1/1") for name in others]


def _run(name: str, part: str, marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marker, "--part", part, "-p", "no:cacheprovider", name]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name, part", _runs())
def test_interpreted(name: str, part: str):
    _run(name, part, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name, part", _runs())
def test_interpreted_all_shapes(name: str, part: str):
    _run(name, part, "slow")
