"""Every op and both losses on both GPU backends: right, bitwise repeatable, capturable, never synchronising.

Answers are held to the fp64 reference on the CPU in every dtype. Everything goes through the public functions.
HPKERNELS_REPEATS says how often a call is repeated (30).
"""

from __future__ import annotations

import contextlib
import functools
import os

import pytest
import torch
from torch import Tensor

from hpkernels import dispatch, tuning
from tests.gpu.calls import CALLS, DEFAULT, DTYPES, ODD, Answer, make

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, of the norm
REPEATS = int(os.environ.get("HPKERNELS_REPEATS", "30"))


@functools.cache
def expected(name: str, dtype: torch.dtype, width: int | None = None, size: tuple = ODD) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPKERNELS_BACKEND", "reference")
        return CALLS[name](make(dtype, width=width, size=size), "reference")


def check(answer: Answer, oracle: Answer, dtype: torch.dtype) -> None:
    """Numbers to the budget; bits and counts exactly. Near ties of top-k may be told apart either way."""
    for what, right in oracle.items():
        found = answer[what].cpu()
        if right.is_floating_point():
            error = float((found.double() - right).norm() / right.norm().clamp_min(1e-30))
            assert error <= BUDGET[dtype], f"{what}: relative error {error:.2e}"
        elif right.dtype == torch.int64 and right.ndim == 2:
            assert (found != right).float().mean() <= 2e-3, f"{what}: indices"
        else:
            assert torch.equal(found, right), what


def same(first: Answer, second: Answer) -> bool:
    """Bit for bit."""

    def raw(x: Tensor) -> Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(raw(first[what]), raw(second[what])) for what in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_the_calls_agree_without_a_gpu(name: str, dtype: str) -> None:
    """The same calls and checks by this machine's default backend, so that they are right before a GPU runs them."""
    as_dtype, cpu = DTYPES[dtype], torch.device("cpu")
    inputs = make(as_dtype).to(cpu, as_dtype)
    answer = CALLS[name](inputs, None)
    check(answer, expected(name, as_dtype), as_dtype)
    assert same(answer, CALLS[name](inputs, None))
    assert not same(answer, CALLS[name](make(as_dtype, 1).to(cpu, as_dtype), None))


@pytest.mark.parametrize("name", CALLS)
def test_the_default_size_agrees_without_a_gpu(name: str) -> None:
    inputs = make(torch.float32, size=DEFAULT).to(torch.device("cpu"), torch.float32)
    check(CALLS[name](inputs, None), expected(name, torch.float32, size=DEFAULT), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_fp64(name: str, on: str, dtype: str) -> None:
    as_dtype = DTYPES[dtype]
    check(CALLS[name](make(as_dtype).to(CUDA, as_dtype), on), expected(name, as_dtype), as_dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_fp64_at_the_default_size(name: str, on: str, dtype: str) -> None:
    as_dtype = DTYPES[dtype]
    inputs = make(as_dtype, size=DEFAULT).to(CUDA, as_dtype)
    check(CALLS[name](inputs, on), expected(name, as_dtype, size=DEFAULT), as_dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CALLS)
def test_repeats_bit_for_bit(name: str, on: str, dtype: str) -> None:
    inputs = make(DTYPES[dtype]).to(CUDA, DTYPES[dtype])
    first = CALLS[name](inputs, on)
    assert all(same(first, CALLS[name](inputs, on)) for _ in range(REPEATS - 1))


def shipped() -> list:
    """Every entry of the tables of hpkernels.tuning."""
    tables = sorted(tuning.FOLDER.glob("*.json"))
    return [
        pytest.param(table.stem, entry, id=f"{table.stem}-{entry['op']}-{entry['dtype']}-{entry['d']}-{place}")
        for table in tables for place, entry in enumerate(tuning.entries(table))
    ]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize(("family", "entry"), shipped())
def test_every_shipped_configuration(family: str, entry: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right and repeatable at the widest rows the entry serves, whatever route the shape would take by itself."""
    if family not in ("default", tuning.family(CUDA)):
        pytest.skip(f"a table for other GPUs: {family}")
    if reason := dispatch.why_not("triton", CUDA):
        pytest.skip(reason)
    monkeypatch.setenv("HPKERNELS_BACKEND", "triton")
    dtype = torch.bfloat16 if entry["dtype"] == "half" else torch.float32
    width = entry["d"] or 640
    with contextlib.ExitStack() as stack:
        stack.enter_context(tuning.forced(entry["op"], entry["config"]))
        for route in ("fused", "workspace"):
            if entry["op"].endswith(route):
                stack.enter_context(tuning.forced("contrastive_grad", {"route": route}))
        name = "loss_sparse" if entry["op"].endswith("sparse") else "loss_dense"
        inputs = make(dtype, width=width).to(CUDA, dtype)
        first = CALLS[name](inputs, "triton")
        check(first, expected(name, dtype, width), dtype)
        assert all(same(first, CALLS[name](inputs, "triton")) for _ in range(REPEATS - 1))


@pytest.mark.parametrize("name", CALLS)
def test_captured_graph_replays_on_new_inputs(name: str, on: str) -> None:
    first, second = (make(torch.bfloat16, seed).to(CUDA, torch.bfloat16) for seed in (0, 1))
    right = CALLS[name](second, on)
    static = make(torch.bfloat16).to(CUDA, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        CALLS[name](static, on)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CALLS[name](static, on)
    static.copy_(second)
    graph.replay()
    assert same(captured, right)
    static.copy_(first)
    graph.replay()
    assert same(captured, CALLS[name](first, on))


@pytest.mark.parametrize("name", CALLS)
def test_never_synchronises(name: str, on: str) -> None:
    inputs = make(torch.bfloat16).to(CUDA, torch.bfloat16)
    CALLS[name](inputs, on)  # compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](inputs, on)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_callers_stream(name: str, on: str) -> None:
    """The inputs arrive late on a stream of the caller's; a launch on any other would not see them."""
    right_inputs = make(torch.bfloat16).to(CUDA, torch.bfloat16)
    right = CALLS[name](right_inputs, on)
    static = make(torch.bfloat16, 1).to(CUDA, torch.bfloat16)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        static.copy_(right_inputs)
        answer = CALLS[name](static, on)
    stream.synchronize()
    assert same(answer, right)


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_device_of_its_inputs(name: str, on: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    other = torch.device("cuda", 1)
    answer = CALLS[name](make(torch.float32).to(other, torch.float32), on)
    assert all(x.device == other for x in answer.values())
    check(answer, expected(name, torch.float32), torch.float32)
