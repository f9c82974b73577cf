"""hpkernels._cuda for the CPU: the sources of csrc/cuda compiled against tests/cuda_shim, built once per run.

The fixtures are the modules hpkernels.ops.<op>.cuda on that library: they take CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Iterator[ModuleType]:
    """The compiled library, in the place of hpkernels._cuda for the session."""
    library = tmp_path_factory.mktemp("cuda_shim") / "_cuda.so"
    includes = (ROOT / "tests/cuda_shim", ROOT / "csrc/cuda", pybind11.get_include(), sysconfig.get_path("include"))
    sources = [str(path) for pattern in ("*.cu", "*.cpp") for path in sorted((ROOT / "csrc/cuda").glob(pattern))]
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas",
         "-DHPK_CUDA_SHIM", *(f"-I{path}" for path in includes), "-x", "c++", *sources, "-o", str(library)],
        check=True,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("hpkernels._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import hpkernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hpkernels._cuda", module)
        patch.setattr(hpkernels, "_cuda", module, raising=False)
        yield module


def _on_shim(op: str) -> Iterator[ModuleType]:
    name = f"hpkernels.ops.{op}.cuda"
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def search(shim) -> Iterator[ModuleType]:
    yield from _on_shim("similarity_search")


@pytest.fixture(scope="session")
def contrastive(shim) -> Iterator[ModuleType]:
    yield from _on_shim("contrastive")
