"""Launches of the Triton kernels for GPUs that are not here, recorded instead of made, and compiled where asked.

The public wrappers of the kernels run on CPU tensors of the real sizes while a stand-in driver answers for the GPU. So
what is compiled is what a GPU would get: the wrappers' own configuration tables, argument types, alignments, constants
and what Triton specialises integers by. Results of the wrappers are meaningless here and dropped.

Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hpkernels import tuning
from hpkernels.ops.common import gpu

TARGETS = {"80": GPUTarget("cuda", 80, 32), "90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
FAMILIES = {"90": "hopper", "gfx942": "cdna"}  # the tuning tables they take; others the default
PROCESSORS = {"80": 108, "90": 132, "gfx942": 304}  # by which the wrappers split loops
LARGE = 1 << 20  # numbers of a tensor that is never computed

_RUN = JITFunction.run
_TYPES = {
    torch.bfloat16: "b", torch.float16: "h", torch.float32: "f", torch.float64: "d", torch.int32: "i",
    torch.int64: "l", torch.uint8: "u", torch.bool: "t",
}  # fmt: skip


class _Driver:
    """Stands in for a GPU driver: says which target to compile for, launches nothing."""

    def __init__(self, arch: str):
        self.target = TARGETS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


class _Uncomputed(TorchDispatchMode):
    """What torch makes of large tensors is of the right shape and dtype, and memory that nobody touches."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else its import takes longer than all calls of the wrappers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sizes = [x.numel() for x in _flat(args, kwargs) if isinstance(x, Tensor)]
        factory = not sizes and func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.full)
        if func.is_view or (not factory and max(sizes, default=0) < LARGE):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        made = func(*args, **kwargs | ({"device": "meta"} if factory else {}))
        return tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype), made)


def _flat(args: tuple, kwargs: dict) -> Iterator:
    for value in itertools.chain(args, kwargs.values()):
        yield from value if isinstance(value, (list, tuple)) else (value,)


class _Pointer:
    """All that a compiler wants to know of a tensor, or of what stands for one."""

    def __init__(self, tensor: Any):
        self.dtype, self.misalignment = tensor.dtype, tensor.data_ptr() % 16
        self.small = not isinstance(tensor, Tensor) or tensor.untyped_storage().nbytes() < 1 << 31

    def data_ptr(self) -> int:
        return self.misalignment

    def ptr_range(self) -> int:
        """AMD's compiler asks for it: bytes, as far as they fit 32 bits."""
        return 0 if self.small else 1 << 32


@dataclass(frozen=True)
class Launch:
    """Of a kernel, with its arguments, tensors as pointers."""

    kernel: JITFunction
    args: tuple
    options: dict[str, Any]
    source: str  # source_hash of the kernel

    def compiled(self) -> object:
        """The kernel for the target of the driver in force, or the exception of the compiler."""
        try:
            return _RUN(self.kernel, *self.args, grid=(1,), warmup=True, **self.options)
        except (triton.CompilationError, RuntimeError) as error:  # RuntimeError: a pass of the compiler failed
            return error


def compile_for(arch: str, launches: Iterable[Launch]) -> list[object]:
    driver.set_active(_Driver(arch))
    return [launch.compiled() for launch in launches]


class Recorder:
    """Within its context kernel launches are recorded, and compiled if `compile` is set (`kernels`).

    All by name: `launches` has the hashes of the kernels' sources, `calls` what can be compiled later.
    """

    def __init__(self, arch: str, compile: bool):
        self.arch, self.compile = arch, compile
        self.launches: dict[str, str] = {}
        self.calls: dict[str, Launch] = {}
        self.kernels: dict[str, object] = {}

    def __enter__(self) -> Recorder:
        def run(kernel, *args, grid, warmup, **kwargs):
            name = _launch_name(kernel, args, kwargs)
            if name not in self.launches:
                self.launches[name] = source_hash(kernel)
                pointers = tuple(_Pointer(x) if hasattr(x, "data_ptr") else x for x in args)
                self.calls[name] = Launch(kernel, pointers, kwargs, self.launches[name])
                if self.compile:
                    self.kernels[name] = self.calls[name].compiled()

        JITFunction.run = run
        self._family, self._processors = tuning.family, gpu.processor_count
        tuning.family = lambda device: FAMILIES.get(self.arch, "default")
        gpu.processor_count = lambda device: PROCESSORS[self.arch]
        driver.set_active(_Driver(self.arch))
        self._uncomputed = _Uncomputed()
        self._uncomputed.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._uncomputed.__exit__(*error)
        JITFunction.run = _RUN
        tuning.family, gpu.processor_count = self._family, self._processors


@functools.cache
def source_hash(kernel: JITFunction) -> str:
    """Of the code, without comments and docstrings, of a kernel and of all functions of ours that it calls."""
    sources, pending = {}, [kernel]
    while pending:
        function = pending.pop()
        if function.__name__ in sources:
            continue
        tree = ast.parse(function.src)
        tree.body[0].body = [node for node in tree.body[0].body if not _is_docstring(node)]
        sources[function.__name__] = ast.unparse(tree)
        called = (function.__globals__.get(name) for name in function.fn.__code__.co_names)
        pending += [f for f in called if isinstance(f, JITFunction) and f.__module__.startswith("hpkernels.")]
    return hashlib.sha256("".join(sources[name] for name in sorted(sources)).encode()).hexdigest()[:16]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _launch_name(kernel: JITFunction, args: tuple, kwargs: dict) -> str:
    """Kernel, dtype of its first operand, types of its arguments, and every compile-time option.

    One letter an argument: pointers by what they point to (a capital if not to a multiple of 16 bytes), then numbers by
    what Triton compiles in: 1, d for multiples of 16, n for others (capitals beyond 32 bits), x for floats.
    """
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    at_run = [(p, given.pop(p.name, p.default)) for p in kernel.params if not p.is_constexpr]
    at_run = [(p, getattr(value, "base", value)) for p, value in at_run]  # what a tensor descriptor describes
    dtype = str(at_run[0][1].dtype).removeprefix("torch.")
    given = {key: value for key, value in given.items() if key != "PRECISION" or dtype == "float32"}
    shown = " ".join(f"{key}={value if isinstance(value, str) else int(value)}" for key, value in sorted(given.items()))
    pointers = "".join(_pointer(value) for _, value in at_run if hasattr(value, "data_ptr"))
    numbers = "".join(_number(p, value) for p, value in at_run if not hasattr(value, "data_ptr"))
    return f"{kernel.__name__} {dtype} {pointers}({numbers}) {shown}"


def _pointer(tensor: Any) -> str:
    letter = _TYPES[tensor.dtype]
    return letter.upper() if tensor.data_ptr() % 16 else letter


def _number(parameter: Any, value: float | None) -> str:
    if not isinstance(value, int):
        return "-" if value is None else "x"
    if parameter.do_not_specialize:
        return "s"
    if value == 1:
        return "1"
    letter = "n" if value % 16 or parameter.do_not_specialize_on_alignment else "d"
    return letter if -(1 << 31) <= value < 1 << 31 else letter.upper()
