"""Numbers of the Triton kernels, under Triton's interpreter on CPU tensors: one process for each op.

Directly: TRITON_INTERPRET=1 python -m pytest tests/triton_kernels/interpreted tests/properties [-m slow]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"
NAMES = [*sorted(path.name for path in FOLDER.glob("test_*.py")), "../../properties"]


def _run(name: str, marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marker, "-p", "no:cacheprovider", str(FOLDER / name)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str):
    _run(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_interpreted_all_shapes(name: str):
    _run(name, "slow")
