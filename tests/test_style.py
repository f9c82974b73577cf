"""ruff, mypy and clang-format as the repository has them, and the types that a user's program sees."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import hpkernels
import hpseg

ROOT = Path(__file__).parent.parent
PROGRAM = """
import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_type

import hpkernels as hk
import hpseg
from hpkernels.nn import HiddenPositiveLoss

z, features, pool = torch.randn(8, 4), torch.randn(8, 6), torch.randn(3, 6)
labels = torch.arange(8) % 2

assert_type(hk.hidden_positive_loss(z, features, pool), Tensor)
assert_type(hk.hidden_positive_loss(z, features, pool, head_in_denominator=True, return_stats=False), Tensor)
loss, stats = hk.hidden_positive_loss(z, features, pool, return_stats=True)
assert_type(stats, hk.LossStats)
assert_type(stats.kept_fraction, Tensor)


def either(told: bool) -> None:
    assert_type(hk.hidden_positive_loss(z, features, pool, return_stats=told), Tensor | tuple[Tensor, hk.LossStats])


assert_type(HiddenPositiveLoss(temperature=0.5).forward(z, features, pool), Tensor | tuple[Tensor, hk.LossStats])
assert_type(hk.hidden_positives(features, pool), hk.PairMask)
assert_type(hk.masked_contrastive_loss(z, hk.PairMask.from_labels(labels)), Tensor)
assert_type(hk.supervised_contrastive_loss(z, labels), Tensor)
assert_type(hk.topk_similarity(z, z, 2), tuple[Tensor, Tensor])
assert_type(hk.kmeans(z, 2).labels, Tensor)
assert_type(hk.local_mix(z[None], torch.randn(1, 2, 8, 8), (2, 4)), Tensor)

segmenter = hpseg.load("run")
assert_type(segmenter, hpseg.Segmenter)
assert_type(segmenter.predict("photo.jpg"), np.ndarray)
hpseg.overlay("photo.jpg", segmenter.predict("photo.jpg")).save("overlay.png")

hk.hidden_positive_loss(z, features, pool, temperature="0.5")  # wrong: call-overload
hk.hidden_positive_loss(z, features, pool, tau=0.5)  # wrong: call-overload
hk.topk_similarity(z, z)  # wrong: call-arg
hk.no_such_name  # wrong: attr-defined
hpseg.overlay("photo.jpg")  # wrong: call-arg
hpseg.no_such_name  # wrong: attr-defined
"""


def tool(name: str, *arguments: str) -> str:
    pytest.importorskip(name)
    command = [sys.executable, "-m", name, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not result.stderr and result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout


def test_ruff():
    found = tool("ruff", "check", "--quiet", ".")
    assert not found, found


def test_clang_format():
    clang_format = pytest.importorskip("clang_format")
    listed = [path for folder in ("csrc", "tests/cuda_shim", ".ci") for path in (ROOT / folder).rglob("*")]
    sources = [str(path) for path in listed if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    assert len(sources) > 80
    command = [clang_format.get_executable("clang-format"), "--dry-run", "--Werror", *sources]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_types():
    found = tool("mypy", "--no-error-summary")
    assert not found, found


def test_types_in_a_program(tmp_path):
    """What is right passes, what is wrong is found, and every public name is known."""
    names = [f"{module.__name__}.{name}" for module in (hpkernels, hpseg) for name in module.__all__]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "import hpkernels\n" + "\n".join(names) + "\n")
    found = tool("mypy", "--no-error-summary", str(program))
    errors = list(dict.fromkeys(re.findall(r"^\S*program\.py:(\d+): error: .*\[(\S+)\]$", found, re.MULTILINE)))
    lines = enumerate(PROGRAM.splitlines(), 1)
    wrong = [(str(number), line.partition("# wrong: ")[2]) for number, line in lines if "# wrong: " in line]
    assert errors == wrong, found
    for package in ("hpkernels", "hpseg"):
        assert (files(package) / "py.typed").is_file()
