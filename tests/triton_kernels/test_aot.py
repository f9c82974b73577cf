"""Every shipped configuration of every Triton kernel compiles for sm_80 and sm_90, and the main one of each for an AMD
GPU, within its limits (see aot.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def _aot(*arguments: str) -> None:
    """In a process of its own, without the interpreter: aot.py puts a stand-in for the GPU's driver in place."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton_kernels.aot", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_committed_table_is_of_these_kernels_and_within_limits():
    _aot("--check")


@pytest.mark.parametrize("match", ["pairs_above 512", "grad all 1 workspace 0.8 512", "grad dense 3 fused 0.8 256"])
def test_some_configurations_compile(match: str):
    _aot("--match", match, "--widths", match.split()[-1], "--jobs", "1")


@pytest.mark.parametrize("match", ["max_similarity 512", "neighbor_weights_qk 22"])
def test_some_configurations_compile_for_amd(match: str):
    _aot("--match", match, "--archs", "gfx942", "--jobs", "1")


@pytest.mark.slow
def test_every_configuration_compiles():
    _aot("--match", "")
