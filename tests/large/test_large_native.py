"""Large problems on the CPU: offsets past 2^31, many rows in little memory, address space that runs out.

Each case is a process of its own. All of them: pytest -m "slow or not slow" tests/large/test_large_native.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.large import large, many_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")


def run(module: str, *arguments: str) -> str:
    """The last line that the module prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] or f"ended by signal {-done.returncode}"
    print(done.stdout)
    return done.stdout.rstrip().rpartition("\n")[2]


@pytest.mark.parametrize("case", [case.__name__ for case in large.QUICK])
def test_offsets_past_two_to_the_31(case, record_property):
    run("tests.large.large", case)
    record_property("tally", ("cases of offsets past 2^31 in CPU kernels", 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case.__name__ for case in large.LONG])
def test_offsets_past_two_to_the_31_in_passes(case, record_property):
    run("tests.large.large", case)
    record_property("tally", ("cases of offsets past 2^31 in CPU kernels", 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case.__name__ for case in many_rows.CASES])
def test_many_rows_in_linear_memory(case, record_property):
    found = json.loads(run("tests.large.many_rows", case, os.environ.get("HPKERNELS_TEST_ROWS", str(many_rows.ROWS))))
    assert found["bytes"] <= found["bound"], found
    record_property("tally", (f"calls on {found['rows']:,} rows", 1))


@pytest.mark.parametrize("growth", [None, pytest.param("1.5", marks=pytest.mark.slow)])
def test_out_of_memory_says_so_and_the_process_goes_on(growth, record_property):
    """Once for each call, or in steps until it comes through."""
    record_property("tally", ("times out of memory", int(run("tests.large.exhausted", *filter(None, [growth])))))
