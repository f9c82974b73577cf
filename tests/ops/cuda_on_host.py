"""hpkernels._cuda for the CPU: csrc/cuda compiled against tests/cuda_shim, once a run for all workers."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Kernels read and write packed numbers through other types, as the GPU's compiler lets them. The namespace has another
# name, so that no type is the one of an installed hpkernels._cuda.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas",
         "-DHPK_CUDA_SHIM", "-Dhpk=hpk_shim"]  # fmt: skip


def build_shim(folder: Path) -> Path:
    """The library, compiled in `folder` unless another process of this run has done so."""
    library = folder / "_cuda.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            ours = (ROOT / "tests/cuda_shim", ROOT / "csrc/cuda", ROOT / "csrc/shared")
            includes = (ours[0], ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
            compiler = ["g++", *FLAGS, *(f"-I{path}" for path in includes), "-x", "c++"]
            sources = [path for place in ours for path in sorted(place.rglob("*")) if path.suffix in (".cu", ".cpp")]
            objects = [str(folder / f"{source.name}.o") for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = ([*compiler, "-c", str(source), "-o", target] for source, target in zip(sources, objects))
                list(pool.map(lambda command: subprocess.run(command, check=True), commands))
            part = folder / "_cuda.part"
            subprocess.run(["g++", "-shared", *objects, "-o", str(part)], check=True)
            part.rename(library)
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ModuleType:
    """The compiled library as a module; it is not yet in the place of hpkernels._cuda."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_shim"
    folder.mkdir(exist_ok=True)
    # Not by the name of the extension that may be installed: pybind11 would give that one again.
    spec = importlib.util.spec_from_file_location("cuda_shim._cuda", build_shim(folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shim(library) -> Iterator[ModuleType]:
    """The library in the place of hpkernels._cuda, while the tests of one file run.

    What imports it, hpkernels.ops.<op>.cuda, is imported anew: it takes CPU tensors, and so does `backend="cuda"`.
    """
    import hpkernels
    from hpkernels import dispatch

    def importers() -> list[str]:
        return [name for name in sys.modules if re.match(r"hpkernels\.ops\.(?!common\.)\w+\.cuda\b", name)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hpkernels._cuda", library)
        patch.setattr(hpkernels, "_cuda", library, raising=False)
        patch.setitem(dispatch.MISSING, "cuda", None)
        patch.setattr(dispatch, "_cuda_takes", library.device_type)
        for module in importers():
            patch.delitem(sys.modules, module)
        dispatch.implementation.cache_clear()
        yield library
        for module in importers():
            del sys.modules[module]
        dispatch.implementation.cache_clear()
