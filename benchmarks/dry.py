"""A step as on a GPU, without one: which kernels it launches, which torch calls it makes, what memory it takes.

    python -m benchmarks.dry [--rate 0.02] [--backend triton] [--launches]

Tensors have shapes and no numbers (torch's "meta" device), and say that they lie on a GPU; the kernels of hpkernels are
recorded instead of launched. So a step of any size runs in a second, by the code, the configurations and the branches
that a GPU would get. Memory is counted storage by storage, in the pieces of 512 bytes that torch gives out; what a
library takes inside one torch call (a sort, a product of matrices) is not seen. A call that waits for the device, or
whose result depends on its numbers, is an error: so is one that a CUDA graph could not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import itertools
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from hpkernels import dispatch
from hpkernels.losses.hidden_positive import hidden_positive_loss

GPU = torch.device("cuda", 0)
PROCESSORS, CAPABILITY = 132, (9, 0)  # of an H200
_PIECE = 512  # bytes: torch's CUDA allocator gives out whole pieces
_NEW = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")


class Waits(RuntimeError):
    """A call that would wait for the device."""


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel was given."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:  # so that Triton takes it for a tensor, and compiles for its alignment
        return self.address

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """A kernel that would have been launched."""

    name: str
    function: object  # the triton.JITFunction, or None for a function of hpkernels._cuda
    grid: tuple[int, ...]
    arguments: tuple[object, ...]  # Operands and numbers
    options: dict[str, object]
    op: str  # the op of hpkernels that it belongs to


@dataclass(frozen=True)
class Call:
    """A call that reached torch's dispatcher: "view" (no work on the device), "memory" (takes some) or "work"."""

    name: str
    kind: str
    op: str  # the op of hpkernels that made it, or ""
    moved: int = 0  # bytes of its operands and results
    products: int = 0  # operations of a matrix product


@dataclass
class Step:
    """What a function did."""

    launches: list[Launch] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)  # of hpkernels, one within another too
    bytes_now: int = 0
    peak_bytes: int = 0  # beyond what there was before
    peak_op: str = ""
    held_at_peak: dict[str, int] = field(default_factory=dict)  # bytes by who asked for them: op, shape, dtype

    def torch_calls(self) -> int:
        """Calls with work for the device: one kernel or more each."""
        return sum(call.kind == "work" for call in self.calls)


class _Answers(TorchFunctionMode):
    """Tensors without numbers say that they lie on a GPU, and are made where one asks for a GPU's."""

    def __init__(self, addresses: Callable[[Tensor], int]) -> None:
        super().__init__()
        getter = {torch.Tensor.device: GPU, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}
        self.answers = {attribute.__get__: answer for attribute, answer in getter.items()}
        self.answers[torch.Tensor.is_meta.__get__] = False
        self.addresses = addresses

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and _is_meta(args[0]):
            if function in self.answers:
                return self.answers[function]
            if function is torch.Tensor.data_ptr:
                return self.addresses(args[0])
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = torch.device(kwargs["device"])
        if function in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            raise Waits(f"torch.{function.__name__} waits: it copies numbers of the host")
        args = [torch.device("meta") if _is_gpu(value) else value for value in args]
        kwargs = {key: torch.device("meta") if _is_gpu(value) else value for key, value in kwargs.items()}
        return function(*args, **kwargs)


def _is_gpu(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _is_meta(x: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return x.is_meta


class _Counts(TorchDispatchMode):
    """Writes calls, ops and memory into a Step, and runs the ops of hpkernels as on a GPU."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.op: list[str] = []
        self.known: dict[int, int] = {}  # storages by id: their addresses
        self.held: Counter[str] = Counter()
        self.next_address = 1 << 32
        self.answers = _Answers(self.address)

    def address(self, x: Tensor) -> int:
        with torch._C.DisableTorchFunction():
            return self._meet(x, None) + x.storage_offset() * x.element_size()

    def _meet(self, x: Tensor, label: str | None) -> int:
        """The address of x's storage; one not met before counts as the label's, or as there before."""
        storage = x.untyped_storage()
        number = id(storage)  # one Python object a storage, as long as this lives
        if number not in self.known:
            size = -(-storage.nbytes() // _PIECE) * _PIECE
            self.known[number], self.next_address = self.next_address, self.next_address + size + _PIECE
            self._take(size, label)
            weakref.finalize(storage, self._give_back, number, size, label)
        return self.known[number]

    def _take(self, size: int, label: str | None) -> None:
        if label is None:
            return
        self.held[label] += size
        self.step.bytes_now += size
        if self.step.bytes_now > self.step.peak_bytes:
            self.step.peak_bytes, self.step.peak_op = self.step.bytes_now, self.op[-1] if self.op else ""
            self.step.held_at_peak = {key: held for key, held in self.held.items() if held}

    def _give_back(self, number: int, size: int, label: str | None) -> None:
        del self.known[number]
        if label is not None:
            self.held[label] -= size
            self.step.bytes_now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "hpkernels":
            name = function._opname
            self.step.ops.append(name)
            self.op.append(name)
            try:
                with self, self.answers:
                    return OPDEFS[f"hpkernels::{name}"]._init_fn(*args, **kwargs)
            finally:
                self.op.pop()
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in inputs:
            self._meet(x, None)
        self._refuse(function, inputs, kwargs)
        out = function(*args, **kwargs)
        self._count(function, inputs, out)
        return out

    def _refuse(self, function, inputs: list[Tensor], kwargs: dict) -> None:
        places = {_is_meta(x) for x in inputs}
        if "copy" in function._opname and kwargs.get("device") is not None:
            places.add(kwargs["device"].type == "meta")
        copies = "copy" in function._opname and len(places) > 1
        numbers = torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags
        if numbers and function._opname in ("index", "index_put", "index_put_"):  # by numbers it takes no wait
            numbers = any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
        if copies or (numbers and True in places):
            raise Waits(f"{function} in {self.op or 'no op'}: waits for the device, or its result depends on numbers")

    def _count(self, function, inputs: list[Tensor], out: object) -> None:
        name, op = function._opname, self.op[-1] if self.op else ""
        results = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor) and _is_meta(x)]
        for x in results:
            if _key(x) not in self.known:
                self._meet(x, f"{op or 'torch'}: {name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}")
        returns = function._schema.returns
        aliases = [r.alias_info is not None and not r.alias_info.is_write for r in returns]
        kind = "memory" if name in _NEW else "view" if returns and all(aliases) else "work"
        moved = sum(x.numel() * x.element_size() for x in [*inputs, *results])
        products = 2 * results[0].numel() * inputs[0].shape[-1] if name in ("mm", "bmm") else 0
        self.step.calls.append(Call(name, kind, op, moved, products))

    def launched(self, name: str, function: object, grid: tuple, args: tuple, options: dict) -> None:
        op = self.op[-1] if self.op else ""
        self.step.launches.append(Launch(name, function, grid, tuple(map(self.operand, args)), options, op))

    def operand(self, x: object) -> object:
        """What a launch keeps of an argument, and that is no tensor: it would not be given back."""
        if isinstance(x, TensorDescriptor):
            described = copy.copy(x)
            described.base = self.operand(x.base)
            return described
        if not isinstance(x, Tensor):
            return x
        with torch._C.DisableTorchFunction():
            return Operand(tuple(x.shape), x.stride(), x.dtype, self.address(x))


def _key(x: Tensor) -> int:
    return id(x.untyped_storage())


class _Native(ModuleType):
    """In the place of `hpkernels._cuda`: its functions are recorded, its classes hold what they are given."""

    device_type = "cuda"
    group_panel, group_piece_bytes = 64, 1024  # csrc/cuda/contrastive: lists.cuh, lists_grad.cuh
    ContrastivePairs = SimpleNamespace(all="all", positives="positives", negatives="negatives", named_by_bits="bits")

    def __init__(self, counts: _Counts) -> None:
        super().__init__("hpkernels._cuda")
        self.counts = counts

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return lambda *arguments: arguments
        return lambda *arguments: self.counts.launched(name, None, (), arguments, {})


@contextlib.contextmanager
def _as_on_a_gpu(counts: _Counts) -> Iterator[None]:
    properties = SimpleNamespace(
        multi_processor_count=PROCESSORS, major=CAPABILITY[0], minor=CAPABILITY[1], name="H200"
    )
    native = _Native(counts)
    with contextlib.ExitStack() as stack:
        for name, answer in (
            ("get_device_properties", lambda device=None: properties),
            ("get_device_capability", lambda device=None: CAPABILITY),
            ("device", lambda device: contextlib.nullcontext()),
            ("current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(_in_place_of_extension(native))
        if dispatch.MISSING["triton"] is None:
            function = importlib.import_module("triton.runtime.jit").JITFunction
            stack.enter_context(mock.patch.object(function, "run", _recording(counts)))
        yield


@contextlib.contextmanager
def _in_place_of_extension(native: ModuleType) -> Iterator[None]:
    """`hpkernels._cuda` is `native`, and the modules that import it are imported anew."""
    import hpkernels

    def importers() -> list[str]:
        return [name for name in sys.modules if re.fullmatch(r"hpkernels\.ops\.(?!common\.)\w+\.cuda", name)]

    before = {name: sys.modules.pop(name) for name in importers()}
    installed = sys.modules.get("hpkernels._cuda")
    sys.modules["hpkernels._cuda"] = native
    dispatch.implementation.cache_clear()
    try:
        with (
            mock.patch.object(hpkernels, "_cuda", native, create=True),
            mock.patch.dict(dispatch.MISSING, {"cuda": None}),
            mock.patch.object(dispatch, "_cuda_problem", lambda device: None),
        ):
            yield
    finally:
        del sys.modules["hpkernels._cuda"]
        if installed is not None:
            sys.modules["hpkernels._cuda"] = installed
        for name in importers():
            del sys.modules[name]
        sys.modules.update(before)
        dispatch.implementation.cache_clear()


def _recording(counts: _Counts) -> Callable[..., None]:
    def run(kernel, *args, grid, warmup, **options):
        sizes = grid(options) if callable(grid) else grid
        counts.launched(kernel.__name__, kernel, tuple(sizes), args, options)

    return run


def follow(function: Callable[[], object]) -> Step:
    """What `function`, which takes and makes tensors of `like_gpu`, does. TRITON_INTERPRET must not be set."""
    step = Step()
    counts = _Counts(step)
    with _as_on_a_gpu(counts), torch.random.fork_rng(devices=[]), counts.answers, counts:
        function()
    return step


def like_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> Tensor:
    """A tensor without numbers, on the GPU that is not there while `follow` runs a function."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def backward(loss: Tensor) -> None:
    """loss.backward(), with the answers of a GPU in force (Tensor.backward suspends them)."""
    ones = torch.empty((), dtype=loss.dtype, device="meta")
    torch.autograd.Variable._execution_engine.run_backward((loss,), (ones,), False, False, (), True, True)


def loss_step(
    rate: float, backend: str | None = "triton", *, images: int = 64, tokens: int = 784, channels: int = 384,
    code: int = 512, pool: int = 2048, streams: int = 2, head: bool = True, dtype: torch.dtype = torch.bfloat16,
    **options: object,
) -> Step:  # fmt: skip
    """A step of `hidden_positive_loss`, forward and backward; the paper's by default. The code's gradient counts."""
    rows = images * tokens
    z = [like_gpu(rows, code, dtype=dtype, requires_grad=True) for _ in range(streams)]
    given = dict(features=like_gpu(rows, channels, dtype=dtype), pool=like_gpu(pool, channels, dtype=dtype))
    if head:
        features, reference = like_gpu(rows, code, dtype=dtype), like_gpu(pool, code, dtype=dtype)
        given |= dict(head_features=features, head_pool=reference, head_weight=0.5)
    if streams > 1:
        given |= dict(z_local=z[1])

    def run() -> None:
        loss = hidden_positive_loss(
            z[0], tokens_per_image=tokens, negative_rate=rate, seed=1, backend=backend, **given, **options
        )
        backward(loss)

    return follow(run)


def lines(step: Step) -> list[str]:
    """The figures, and who makes them."""
    found = [
        f"peak extra memory {step.peak_bytes / 2**30:.3f} GiB ({step.peak_bytes:,} bytes) in {step.peak_op or 'torch'}",
        *(f"    {size / 2**20:9.1f} MiB  {key}" for key, size in sorted(step.held_at_peak.items(), key=lambda i: -i[1])
          if size >= 2**20),
        f"{len(step.launches)} launches",
        *(f"    {n:4} {name}" for name, n in Counter(launch.name for launch in step.launches).most_common()),
        f"{len(step.ops)} ops of hpkernels",
        f"{step.torch_calls()} torch calls with work, {sum(c.kind == 'memory' for c in step.calls)} that take memory, "
        f"{sum(c.kind == 'view' for c in step.calls)} views",
    ]  # fmt: skip
    work = [call for call in step.calls if call.kind == "work"]
    for op, calls in itertools.groupby(sorted(work, key=lambda call: call.op), lambda call: call.op):
        names = Counter(call.name for call in calls)
        shown = ", ".join(f"{name} {n}" for name, n in names.most_common())
        found.append(f"    {sum(names.values()):4} in {op or 'no op'}: {shown}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, nargs="*", default=[0.02, 1.0])
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--launches", action="store_true", help="every launch with its grid and operands")
    arguments = parser.parse_args()
    for rate in arguments.rate:
        step = loss_step(rate, arguments.backend)
        print(f"rate {rate:g}, {arguments.backend}", *lines(step), sep="\n")
        for launch in step.launches if arguments.launches else ():
            shown = [f"{x.dtype} {x.shape}" if isinstance(x, Operand) else x for x in launch.arguments]
            print(f"{launch.op}: {launch.name} {launch.grid}", *shown, launch.options)


if __name__ == "__main__":
    main()
