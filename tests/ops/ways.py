"""The ways to run an op: plain torch, a CPU's instruction sets, CUDA kernels on the host, Triton's interpreter, a GPU.

A process runs either Triton's interpreter (TRITON_INTERPRET=1, which has to be set before triton is imported) or all
the others.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch

from hpkernels import dispatch

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", FP64: "fp64", BF16: "bf16", FP16: "fp16"}


def label(value: object) -> str:
    """In the ids of tests."""
    return NAMES[value] if isinstance(value, torch.dtype) else str(value)


@dataclass(frozen=True)
class Way:
    name: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    isa: str | None = None
    device: str = "cpu"

    @property
    def missing(self) -> str | None:
        """Why this machine cannot go this way."""
        if self.device == "cpu":
            return None if self.backend == "cuda" else dispatch.why_not(self.backend, torch.device("cpu"))
        return dispatch.why_not(self.backend, torch.device("cuda")) if torch.cuda.is_available() else "no CUDA device"

    @contextlib.contextmanager
    def open(self, op: str) -> Iterator[ModuleType | SimpleNamespace]:
        """The backend's functions of op folder `op`, of CPU tensors."""
        if self.isa is not None:
            with instruction_set(self.isa):
                yield dispatch.implementation(op, self.backend)
        elif self.device == "cpu":
            yield dispatch.implementation(op, self.backend)
        else:
            yield _on_device(dispatch.implementation(op, self.backend), self.device)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Of the CPU's kernels, for a while."""
    _cpu = importlib.import_module("hpkernels._cpu")
    before = _cpu.isa()
    _cpu.set_isa(name)
    try:
        yield
    finally:
        _cpu.set_isa(before)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def all_ways() -> list[Way]:
    """Those of this process, best understood first; a GPU's are among them also where there is none."""
    gpu = (BF16, FP16, FP32)
    if interpreting():
        return [Way("interpreter", "triton", (FP32, FP16))]  # its products of bf16 are wrong
    isas = () if dispatch.MISSING["cpu"] else importlib.import_module("hpkernels._cpu").isas()
    return [
        Way("reference", "reference", (FP32, FP64, BF16, FP16)),
        *(Way(f"cpu-{isa}", "cpu", (FP32, FP64, BF16, FP16), isa) for isa in isas),
        Way("host-cuda", "cuda", gpu),
        Way("gpu-triton", "triton", gpu, device="cuda"),
        Way("gpu-cuda", "cuda", gpu, device="cuda"),
    ]


def moved(value: object, device: str) -> object:
    """Tensors, also in tuples, on another device; whatever else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _on_device(module: ModuleType, device: str) -> SimpleNamespace:
    """The module's functions, of and to CPU tensors, run on the device."""

    def run(function, *arguments, **options):
        given = [moved(argument, device) for argument in arguments]
        return moved(function(*given, **{name: moved(option, device) for name, option in options.items()}), "cpu")

    functions = {name: thing for name, thing in vars(module).items() if callable(thing)}
    return SimpleNamespace(**{name: functools.partial(run, function) for name, function in functions.items()})
