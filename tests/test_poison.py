"""Fresh memory is full of NaN where tests want it, torch's and the CPU extension's own, and afterwards as before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import poison

ROOT = Path(__file__).resolve().parents[1]
# The extension keeps the scratch of a search for the next one; what no search wrote is still as it was filled.
LOOK = """
import sys
import torch
from hpkernels import _cpu
from tests import poison

def filled():
    _cpu.release_memory()
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(700, 300), dim=1)
    from hpkernels import topk_similarity
    topk_similarity(x, x, 9, backend="cpu")
    runs = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
        for line in maps:
            places, rights, _, _, inode, *name = line.split()
            if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
                first, end = (int(place, 16) for place in places.split("-"))
                memory.seek(first)
                runs += memory.read(end - first).count(b"\\xff" * 4096)
    return runs

without = filled()
with poison.filled():
    assert filled() > without, "poisoned"
    with poison.filled(False):
        assert not poison.is_on()
    assert poison.is_on()
"""


def test_torchs_memory_is_filled_for_a_while():
    before = torch.are_deterministic_algorithms_enabled()
    with poison.filled():
        assert torch.empty(1000).isnan().all() and torch.empty(1000, dtype=torch.int32).min() > 1 << 30
        with poison.filled(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_the_fixture_is_on(poisoned_memory):
    assert poison.is_on() and torch.empty(1000).isnan().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc/self/mem")
def test_scratch_of_the_cpu_extension_is_filled():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_test_that_poisons_does_not_end_poisoning(tmp_path):
    """Under --poison every test has it, also after one with the fixture."""
    tests = tmp_path / "test_two.py"
    tests.write_text(
        "from tests import poison\n\n\ndef test_first(poisoned_memory):\n    assert poison.is_on()\n\n\n"
        "def test_second():\n    assert poison.is_on()\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.conftest",
        "--poison",
        tests,
    ]
    done = subprocess.run([*command, "-c", "/dev/null"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
