"""Every shipped configuration of every Triton kernel compiles for sm_80 and sm_90, and the main one of each for an AMD
GPU, within its limits, with every Triton that counts (see aot.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
OTHERS = "HPKERNELS_TRITONS"  # folders with other Tritons (aot.py says how to have one), by colons
IMPORT_ALL = """
import pathlib
for file in sorted(pathlib.Path("hpkernels/ops").rglob("*.py")):
    if "triton" in file.parts[-2:] or file.name == "triton.py":
        __import__(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
        print(file)
"""


def _run(*command: str, triton: str | None = None) -> str:
    """In a process of its own, without the interpreter: aot.py puts a stand-in for the GPU's driver in place."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if triton:
        environment["PYTHONPATH"] = f"{triton}:{ROOT}"
    command = (sys.executable, "-W", "ignore", *command)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def _compiles(match: str, *arguments: str, triton: str | None = None) -> None:
    printed = _run("-m", "tests.triton_kernels.aot", "--match", match, *arguments, "--jobs", "1", triton=triton)
    assert not re.search(r": 0 kernels", printed), f"no case is called {match}"


def test_the_committed_table_is_of_these_kernels_and_within_limits():
    _run("-m", "tests.triton_kernels.aot", "--check")


@pytest.mark.parametrize(
    "match",
    [
        "pairs_above 512 50176",
        "grad all 1 workspace 0.8 512 50176",
        "grad dense 3 fused 0.8 256 50176",
        "neighbor_weights_qk 28 50176",  # hpseg's default: once not to be compiled in fp32
    ],
)
def test_some_configurations_compile(match: str):
    _compiles(match, "--widths", match.split()[-2] if "qk" not in match else "512", "--archs", "90")


@pytest.mark.parametrize("match", ["max_similarity 512", "neighbor_weights_qk 22"])
def test_some_configurations_compile_for_amd(match: str):
    _compiles(match, "--archs", "gfx942")


def _others() -> list[str]:
    folders = os.environ.get(OTHERS, "").split(":")
    if not folders[0]:
        pytest.skip(f"no other Triton is installed: {OTHERS} names none")
    return folders


def test_kernels_compile_with_other_tritons():
    for folder in _others():
        assert "hpkernels/ops/local_mix/triton.py" in _run("-c", IMPORT_ALL, triton=folder)
        _compiles("neighbor_weights_qk 28 50176", "--widths", "512", "--archs", "90", triton=folder)


def test_kernels_import():
    assert _run("-c", IMPORT_ALL).count("\n") >= 10


@pytest.mark.slow
def test_every_configuration_compiles():
    _compiles("")


# ------------------------------------------------------------------ names and versions


@triton.jit
def _example_kernel(
    a_ptr, b_ptr, c_ptr, n, width, stride, words, total,
    BLOCK_M: triton.language.constexpr, PRECISION: triton.language.constexpr,
):  # fmt: skip
    pass


def test_what_triton_compiles_in_is_part_of_a_name():
    """A size that 16 does not divide, a tensor off 16 bytes, another precision: other kernels."""
    from tests.triton_kernels.recorder import _launch_name

    def name(n: int = 64, first: int = 0, dtype: torch.dtype = torch.float32, precision: str = "ieee") -> str:
        x, options = torch.zeros(80, dtype=dtype)[first:], dict(BLOCK_M=64, PRECISION=precision)
        return _launch_name(_example_kernel, (x, x, x, n, 512, 512, 4, 1 << 40), options)

    assert name() == "_example_kernel float32 fff(dddnD) BLOCK_M=64 PRECISION=ieee"
    assert name() == name(n=128) and "(nddnD)" in name(n=50) and "(1ddnD)" in name(n=1)
    assert " FFF(" in name(first=1) and " fff(" in name(first=4)
    assert name(precision="tf32x3") != name()
    half = torch.bfloat16  # which knows one precision
    assert name(dtype=half, precision="tf32x3") == name(dtype=half) == "_example_kernel bfloat16 bbb(dddnD) BLOCK_M=64"


def test_every_part_of_the_table_is_checked(monkeypatch: pytest.MonkeyPatch):
    """A part that is missing, a launch that is stale, new, gone or at fault is named, in whichever part it is."""
    from tests.triton_kernels import aot

    figures = {"registers": 99, "stack": 0, "shared": 0, "products": 0, "narrow_offsets": 0}
    names = ("a float32 f(d) PRECISION=ieee", "b float32 f(d)")

    def part(other: str, **changes: object) -> dict:  # other: a form of fp32 products that this Triton lacks
        rows = {
            names[0].replace("ieee", other): figures | {"source": "1"},
            names[1]: figures | {"source": "1"} | changes,
        }
        return {"kernels": dict.fromkeys(aot.TARGETS, rows)}

    now = {name: SimpleNamespace(source="1") for name in names}
    monkeypatch.setattr(aot, "shipped", lambda arch: now)

    def check(**changes: object) -> list[str]:
        parts = {of: part("bf16x6" if of == "3.6" else "ieee") for of in aot.TRITONS}
        monkeypatch.setattr(aot, "recorded", lambda: parts | {"3.6": part("bf16x6", **changes)})
        return aot.check()

    assert check() == []
    assert "Triton 3.6, 80 b float32 f(d): 8 bytes of stack: registers are spilled" in check(stack=8)
    assert any("3.6, 90 b" in line and "changed or new" in line for line in check(source="2"))
    assert any("3.6, 90 b float32 f(d): refused" in line for line in check(error="refused"))
    monkeypatch.setattr(aot, "shipped", lambda arch: {names[0]: now[names[0]]})
    assert len([line for line in check() if "no longer shipped" in line]) == len(aot.TARGETS) * len(aot.TRITONS)
    monkeypatch.setattr(aot, "recorded", dict)
    assert aot.check() == [f"Triton {missing}: no part of the table" for missing in aot.TRITONS]


def test_the_table_has_the_oldest_and_the_newest_triton_of_our_torches():
    from tests.triton_kernels.aot import TRITONS

    head, _, row = re.search(
        r"^(\| torch .*)\n(.*)\n(\| Triton .*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    ).groups()
    torches, tritons = ([cell.strip() for cell in line.split("|")[2:-1]] for line in (head, row))
    assert (tritons[0], tritons[-1]) == (TRITONS[0], TRITONS[-1]) and set(TRITONS) <= set(tritons)
    assert f'"torch>={torches[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"torch=={torches[0]}.*" in (ROOT / ".github/workflows/tests.yml").read_text()
    assert f"torch {torches[0]} or newer" in (ROOT / "README.md").read_text()
