"""The public interface as it was released: names, parameters, defaults, flags. tests/golden/api.json holds it.

A change that is meant is written with `python tests/test_api.py`, and told in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hpkernels
import hpseg
from hpseg.cli.main import VERBS

GOLDEN = Path(__file__).parent / "golden" / "api.json"


def signature(value: object) -> str | dict:
    if inspect.isclass(value) and issubclass(value, Exception):
        return "error"
    if inspect.isclass(value):
        members = {name: getattr(value, name) for name in vars(value) if not name.startswith("_")}
        described = {name: str(inspect.signature(member)) for name, member in members.items() if callable(member)}
        return {"(new)": str(inspect.signature(value)), **dict(sorted(described.items()))}
    return str(inspect.signature(value)) if callable(value) else type(value).__name__


def flags(verb: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(VERBS[verb][0]).add_arguments(parser)
    return {
        " ".join(action.option_strings) or action.dest: f"{action.nargs}, {action.choices}, {action.default}"
        for action in parser._actions
        if action.dest != "help"
    }


def interface() -> dict:
    modules = {"hpkernels": hpkernels, "hpkernels.nn": hpkernels.nn, "hpseg": hpseg}
    found = {
        name: {entry: signature(getattr(module, entry)) for entry in sorted(module.__all__) if entry != "nn"}
        for name, module in modules.items()
    }
    return {**found, "commands": {verb: flags(verb) for verb in VERBS}}


def test_the_interface_is_as_recorded():
    found, recorded = json.loads(json.dumps(interface())), json.loads(GOLDEN.read_text())
    for part in recorded:
        for name, value in recorded[part].items():
            assert found[part].get(name) == value, f"{part}: {name} is not what it was; see the top of this file"
        assert sorted(found[part]) == sorted(recorded[part]), f"{part}: new names; see the top of this file"


def test_one_version_everywhere():
    from importlib.metadata import version

    assert hpkernels.__version__ == hpseg.__version__ == version("hpkernels")
    changes = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"## {hpkernels.__version__}" in changes or "## Unreleased" in changes


def processor_seconds(*command: str) -> float:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bounded(bound: float, measure: Callable[[], float], times: int = 8) -> None:
    """One measurement has to stay within the bound: what else runs on the machine only ever adds to it."""
    found = []
    while not found or found[-1] >= bound:
        assert len(found) < times, f"expected less than {bound} s, got {found}"
        found.append(measure())


@pytest.mark.skipif(sys.platform == "win32", reason="counts processor time as POSIX does")
def test_imports_are_quick():
    """`import hpkernels` adds less than 0.3 s to torch, and `hpseg --help` answers within 1 s."""
    torch_alone = min(processor_seconds("-c", "import torch") for _ in range(3))
    bounded(0.3, lambda: processor_seconds("-c", "import torch, hpkernels") - torch_alone)
    bounded(1.0, lambda: processor_seconds("-m", "hpseg", "--help"))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(interface(), indent=1, sort_keys=True) + "\n")
