"""Which backend runs a call, and why not another.

Backends: "reference" (plain torch, any device, the specification in code), "cpu" (the C++ extension
`hpkernels._cpu`), "triton" (NVIDIA and AMD GPUs; on CPU tensors under TRITON_INTERPRET=1, for tests), "cuda" (the CUDA
C++ extension `hpkernels._cuda`, where it was built).

The compiled ones give the same bits for any number of threads and whatever else is in a batch. The reference promises
less: it is what torch makes of the equations, so its products round as torch's do, by the number of threads and the
place of a row among others, and its backward pass takes part in autocast if called inside of it, as torch advises
against. In return it can be differentiated any number of times and followed by torch.func.

An explicit `backend=` wins, then the environment variable HPKERNELS_BACKEND, then the device's default. Where a GPU can
run both "triton" and "cuda" that is "fastest": each op takes, call by call, the one that the tuning table of the GPU's
family names for its dtype and shape (`hpkernels.tuning`), else Triton. Both have the same bits of pairs and the same
tables of numbers, so one loss may be made by both.

In a source tree an extension that was not built, or was built from other sources, is an error where it would be the
default: the reference, many times slower, does not silently take its place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from hpkernels import tuning
from hpkernels.common.sources import ROOT, in_source_tree, source_hash

BACKENDS = ("reference", "cpu", "triton", "cuda")
_DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
FASTEST, _OF_FASTEST = "fastest", ("triton", "cuda")


def _missing(extension: str, remedy: str) -> str | None:
    name = f"hpkernels.{extension}"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return f"the extension {name} was not built: {remedy}"
        raise
    except ImportError as error:
        return f"the extension {name} is not importable ({error}): {remedy}"
    return None


def _stale(extension: str) -> str | None:
    """Of an extension that is there: whether it was built from other sources than those beside this package."""
    name = f"hpkernels.{extension}"
    built = sys.modules.get(name)
    if built is None or not in_source_tree() or getattr(built, "source_hash", None) == source_hash(extension):
        return None
    return f"the extension {name} is stale, csrc/ has changed since it was built: {_BUILD}"


_BUILD = f"run `pip install .` or `pip install -e .` in {ROOT}"
_BUILD_CPU = _BUILD if in_source_tree() else "reinstall with a C++17 compiler"
_BUILD_CUDA = "reinstall with a CUDA compiler and without HPKERNELS_CUDA=0"
# Found out once, at import: torch.compile traces through choose() and must see constants.
MISSING = {
    "cpu": _missing("_cpu", _BUILD_CPU) or _stale("_cpu"),
    "triton": None if importlib.util.find_spec("triton") else "the triton package is not installed",
    "cuda": _missing("_cuda", _BUILD_CUDA) or _stale("_cuda"),
}
# The reasons that are errors. hpkernels._cuda is not among them where it is merely missing: it need not be built.
_TO_BUILD = tuple(reason for reason in MISSING.values() if reason and _BUILD in reason)
# The type of the tensors that hpkernels._cuda takes: the tests have one for the host.
_cuda_takes = "cuda"


def _cuda_problem(device: str) -> str | None:
    """Why `hpkernels._cuda` cannot run on this device, or None when it can."""
    return _cuda_problem_of(device)


# As torch.compiler.assume_constant_result does, which would import the compiler with us.
_cuda_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark of torch's own


@functools.cache
def _cuda_problem_of(device: str) -> str | None:
    extension = importlib.import_module("hpkernels._cuda")
    if extension.device_type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    return cuda_problem(extension.archs.split(";"), extension.cuda_version, extension.driver_version(), capability)


def cuda_problem(archs: list[str], built: int, driver: int, capability: tuple[int, int]) -> str | None:
    """Why machine code (sm_80) and PTX (compute_90) of a CUDA version cannot run on a GPU of this compute capability.

    Versions count 1000 major + 10 minor, `driver` is the newest that the driver serves. Machine code runs from the
    first driver of its major version on, and on later capabilities of the same major number (sm_90a: on 9.0 alone);
    PTX needs a driver of its own version and runs on every later capability.
    """

    def version(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"

    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 < built // 1000:
        return f"the driver serves CUDA up to {version(driver)}, and the extension was built with {version(built)}"
    major, minor = capability
    only_ptx = False
    for arch in archs:
        kind, _, name = arch.partition("_")
        exact, own = name.endswith("a"), divmod(int(name.rstrip("a")), 10)
        if kind == "sm" and own[0] == major and (own[1] == minor if exact else own[1] <= minor):
            return None
        only_ptx |= kind == "compute" and (own == capability if exact else own <= capability)
    if not only_ptx:
        return f"it was built for {', '.join(archs)}, and this GPU is sm_{major}{minor}: see HPKERNELS_CUDA_ARCHS"
    if driver < built:
        return (
            f"for sm_{major}{minor} it holds PTX of CUDA {version(built)} alone, and the driver serves CUDA up to "
            f"{version(driver)}: see HPKERNELS_CUDA_ARCHS"
        )
    return None


def why_not(backend: str, device: torch.device, *tensors: torch.Tensor | None) -> str | None:
    """The reason `backend` cannot take these tensors on `device`, or None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"it takes CPU tensors, not {device.type} tensors"
        return MISSING["cpu"]
    if backend == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it takes GPU tensors (CPU tensors only under TRITON_INTERPRET=1)"
        if device.type not in ("cpu", "cuda"):
            return f"it takes cuda tensors, not {device.type} tensors"
        return _not_for_float64(tensors) or MISSING["triton"]
    if backend == "cuda":
        if device.type != _cuda_takes:
            return f"it takes {_cuda_takes} tensors, not {device.type} tensors"
        return _not_for_float64(tensors) or MISSING["cuda"] or _cuda_problem(str(device))
    if backend == FASTEST:
        first, second = _OF_FASTEST
        return why_not(first, device, *tensors) or why_not(second, device, *tensors)
    return "it is not a backend of this version: " + ", ".join(BACKENDS)


def _not_for_float64(tensors: tuple[torch.Tensor | None, ...]) -> str | None:
    if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tensors):
        return "it computes in fp32, and an argument is float64"
    return None


def choose(device: torch.device, backend: str | None = None, *tensors: torch.Tensor | None) -> str:
    """The backend for these tensors on `device`. Raises ValueError with the reason if the one asked for cannot run.

    Raises ImportError if none was asked for and the default has to be built first.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    asked, source = backend, "backend"
    if asked is None:
        asked, source = os.environ.get("HPKERNELS_BACKEND") or None, "HPKERNELS_BACKEND"
    if asked is not None:
        reason = why_not(asked, device, *tensors)
        if reason is not None:
            raise ValueError(f"{source}: {asked!r} cannot be used here: {reason}")
        return asked
    for candidate in _DEFAULTS.get(device.type, ("reference",)):
        reason = why_not(candidate, device, *tensors)
        if reason is None:
            return FASTEST if candidate in _OF_FASTEST and why_not(FASTEST, device, *tensors) is None else candidate
        if reason in _TO_BUILD:
            raise ImportError(reason)
    return "reference"


def fastest(choice: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[str, dict | None]:
    """The backend that the tables name for `choice`, a function or one of its forms, on (.., rows, width) numbers, and
    the entry that does; Triton and None without one."""
    rows, width = (1, 1, *shape)[-2:]
    entry = tuning.find(f"backend/{choice}", dtype, width, rows, device)
    if entry is None:
        return _OF_FASTEST[0], None
    backend = entry["config"].get("backend")
    if backend not in _OF_FASTEST:
        raise ValueError(
            f"HPKERNELS_TUNING: expected a backend of {', '.join(_OF_FASTEST)} for {choice}, got {backend!r}"
        )
    return backend, entry


def function(op: str, name: str, backend: str, x: torch.Tensor, form: str = "") -> Callable[..., Any]:
    """`backend`'s function `name` of op folder `op`; x and the form of the call decide where that is "fastest".

    Called where an op runs, so that torch.compile neither traces nor freezes the choice.
    """
    if backend == FASTEST:
        backend, _ = fastest(name + form, x.shape, x.dtype, x.device)
    return getattr(implementation(op, backend), name)


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that holds `backend`'s functions of op folder `op`."""
    return importlib.import_module(f"hpkernels.ops.{op}.{backend}")
