"""Which backend runs a call, and why not another.

Backends: "reference" (plain torch, any device, the specification in code), "cpu" (the C++ extension
`hpkernels._cpu`), "triton" (NVIDIA and AMD GPUs; on CPU tensors under TRITON_INTERPRET=1, for tests).
An explicit `backend=` wins, then the environment variable HPKERNELS_BACKEND, then the device's default.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton")
_MODULES = {"reference": "reference", "cpu": "native", "triton": "kernels"}
_DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


def _cpu_missing() -> str | None:
    try:
        importlib.import_module("hpkernels._cpu")
    except ImportError as error:
        return f"the C++ extension hpkernels._cpu is not importable ({error}); reinstall with a C++17 compiler"
    return None


# Found out once, at import: torch.compile traces through choose() and must see constants.
_MISSING = {
    "cpu": _cpu_missing(),
    "triton": None if importlib.util.find_spec("triton") else "the triton package is not installed",
}


def why_not(backend: str, device: torch.device, *tensors: torch.Tensor | None) -> str | None:
    """The reason `backend` cannot take these tensors on `device`, or None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"it takes CPU tensors, not {device.type} tensors"
        return _MISSING["cpu"]
    if backend == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it takes GPU tensors (CPU tensors only under TRITON_INTERPRET=1)"
        if device.type not in ("cpu", "cuda"):
            return f"it takes cuda tensors, not {device.type} tensors"
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tensors):
            return "it computes in fp32, and an argument is float64"
        return _MISSING["triton"]
    return "it is not a backend of this version: " + ", ".join(BACKENDS)


def choose(device: torch.device, backend: str | None = None, *tensors: torch.Tensor | None) -> str:
    """The backend for these tensors on `device`. Raises ValueError with the reason if the one asked for cannot run."""
    if backend is not None:
        asked, source = backend, "backend"
    else:
        asked, source = os.environ.get("HPKERNELS_BACKEND"), "HPKERNELS_BACKEND"
    if asked:
        reason = why_not(asked, device, *tensors)
        if reason is not None:
            raise ValueError(f"{source}: {asked!r} cannot be used here: {reason}")
        return asked
    for candidate in _DEFAULTS.get(device.type, ("reference",)):
        if why_not(candidate, device, *tensors) is None:
            return candidate
    return "reference"


@functools.lru_cache(maxsize=None)
def implementation(op: str, backend: str) -> ModuleType:
    """The module that holds `backend`'s functions of op folder `op`."""
    return importlib.import_module(f"hpkernels.ops.{op}.{_MODULES[backend]}")
