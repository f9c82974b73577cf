"""benchmarks/gpu_check.sh ends in time and leaves its archive, whatever its steps do. No GPU, no measurement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
LIMITS = {"a": 420, "b": 330}  # seconds
STAND_IN = r"""#!/bin/sh
# In the place of Python: says what it is asked for.
echo "$@" >>"$CALLS"
case "$*" in
    *hpkernels.info*) echo "no such module" >&2; exit 3 ;;
    *--device\ cpu*--marks*) [ -z "$HANGS" ] || exec sleep 600 ;;
esac
echo done
"""


def _stand_in(folder: Path, **environment: str) -> dict[str, str]:
    program = folder / "python"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return os.environ | {"PYTHON": str(program), "CALLS": str(folder / "calls"), "HANGS": ""} | environment


def _command(part: str, out: Path, *steps: str) -> list[str]:
    return ["bash", str(SCRIPT), part, str(out), "--device", "cpu", *steps]


def _archived(out: Path, part: str) -> set[str]:
    with tarfile.open(out / f"gpu_check_{part}.tar.gz") as archive:
        return {Path(name).name for name in archive.getnames()}


@pytest.mark.parametrize("part", LIMITS)
def test_a_failing_step_stops_nothing_and_one_archive_comes_out(part: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(_command(part, out), env=_stand_in(tmp_path), capture_output=True, text=True)
    rows = {row.split()[0]: row.split()[1] for row in (out / f"gpu_check_{part}.txt").read_text().splitlines()[1:]}
    steps = {"a": ["machine", "build", "info", "gpu"], "b": ["machine", "build", "speed", "marks"]}[part]
    assert list(rows) == steps and {rows[step] for step in steps if step != "info"} == {"ok"}
    assert done.returncode == (part == "a") and rows.get("info", "failed") == "failed"
    assert {path.name for path in out.iterdir()} == {f"gpu_check_{part}.txt", f"gpu_check_{part}.tar.gz"}
    assert _archived(out, part) >= {"summary.txt", *(f"{step}.log" for step in steps)}
    calls = (tmp_path / "calls").read_text()
    assert ("-m benchmarks.marks" in calls) == ("--marks" in calls) == (part == "b")
    assert ("--part 1/1 tests/gpu" in calls) == (part == "a")


def test_an_end_from_outside_leaves_what_there_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(_command("b", out), env=_stand_in(tmp_path, HANGS="1"), stdout=subprocess.DEVNULL)
    calls = tmp_path / "calls"
    while not (calls.exists() and "--marks" in calls.read_text()):
        time.sleep(0.05)
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=20) == 143
    assert "speed was interrupted" in (out / "gpu_check_b.txt").read_text()
    assert "machine.log" in _archived(out, "b")
    assert not _running(tmp_path)


def _running(folder: Path) -> bool:
    """Whether a process with the folder in its environment is left, a moment later."""
    time.sleep(0.5)
    mark = f"CALLS={folder}/calls".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                return True
        except OSError:  # another's, or gone
            continue
    return False


def test_what_it_is_not_asked_for_is_refused(tmp_path: Path) -> None:
    for arguments in (["c", str(tmp_path)], ["a"], ["a", str(tmp_path), "no_such_step"]):
        done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "gpu_check.sh a OUT" in done.stderr + done.stdout


def test_the_limits_are_those_that_it_states() -> None:
    text = SCRIPT.read_text()
    for part, seconds in LIMITS.items():
        assert f"    {part}) seconds={seconds} " in text
        assert f"gpu_check.sh {part} OUT [--long] [--device cpu] [step ...]    at most {seconds} s" in text


WITHOUT_PLUGINS = """
import pytest, sys
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("hypothesis", "xdist"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.exit(pytest.main(["--collect-only", "-qq", "tests/gpu"]))
"""


def test_tests_on_a_gpu_need_no_plugins() -> None:
    """Neither hypothesis nor pytest-xdist is on every machine that has a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGINS],
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_on_gpu.py" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", LIMITS)
def test_dry_run(part: str, tmp_path: Path) -> None:
    """All that a part does, on toy sizes."""
    began = time.monotonic()
    done = subprocess.run(_command(part, tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert time.monotonic() - began < LIMITS[part]
    assert _archived(tmp_path / "out", part) >= {"a": {"gpu-1.log"}, "b": {"cpu.json", "cpu.csv"}}[part]
