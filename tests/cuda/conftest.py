"""hpkernels._cuda for the CPU: the sources of csrc/cuda compiled against tests/cuda_shim, built once per run."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def search(tmp_path_factory):
    """The module hpkernels.ops.similarity_search.cuda on the shim: it takes CPU tensors."""
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
        patch.delitem(sys.modules, "hpkernels.ops.similarity_search.cuda", raising=False)
        yield importlib.import_module("hpkernels.ops.similarity_search.cuda")
        sys.modules.pop("hpkernels.ops.similarity_search.cuda", None)
