"""hpkernels._cuda for the CPU: the sources of csrc/cuda compiled against tests/cuda_shim, once a run for all workers.

The fixtures are the modules hpkernels.ops.<op>.cuda on that library: they take CPU tensors, and so does
`backend="cuda"`.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch

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
    module.run_last_blocks = ctypes.CDLL(module.__file__).run_last_blocks
    return module


@pytest.fixture(scope="module")
def shim(library) -> Iterator[ModuleType]:
    """The library in the place of hpkernels._cuda, while the tests of one file run."""
    import hpkernels
    from hpkernels import dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hpkernels._cuda", library)
        patch.setattr(hpkernels, "_cuda", library, raising=False)
        patch.setitem(dispatch.MISSING, "cuda", None)
        patch.setattr(dispatch, "_cuda_takes", library.device_type)
        dispatch.implementation.cache_clear()
        yield library
        dispatch.implementation.cache_clear()


def _on_shim(op: str) -> Iterator[ModuleType]:
    name = f"hpkernels.ops.{op}.cuda"

    def loaded() -> list[str]:
        return [module for module in sys.modules if module.startswith(name)]  # cuda.py, and what it is made of

    with pytest.MonkeyPatch.context() as patch:
        for module in loaded():
            patch.delitem(sys.modules, module)
        yield importlib.import_module(name)
        for module in loaded():
            del sys.modules[module]


@pytest.fixture(scope="module")
def search(shim) -> Iterator[ModuleType]:
    yield from _on_shim("similarity_search")


@pytest.fixture(scope="module")
def contrastive(shim) -> Iterator[ModuleType]:
    yield from _on_shim("contrastive")


@pytest.fixture(scope="module")
def group_lse(shim) -> Iterator[ModuleType]:
    yield from _on_shim("group_lse")


@pytest.fixture(scope="module")
def cluster_assign(shim) -> Iterator[ModuleType]:
    yield from _on_shim("cluster_assign")


@pytest.fixture(scope="module")
def local_mix(shim) -> Iterator[ModuleType]:
    yield from _on_shim("local_mix")


@pytest.fixture(scope="module")
def pair_bits(shim) -> Iterator[ModuleType]:
    yield from _on_shim("pair_bits")


@pytest.fixture(scope="module")
def normalize(shim) -> Iterator[ModuleType]:
    yield from _on_shim("normalize")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN or the largest integer: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
