"""The kernels of a step, compiled for a GPU that need not be there, as figures that a file can hold.

A kernel's figures: hash of its source, registers, shared memory, warps, and `cost`, a tree of the loops with what one
turn of each costs a block: [clocks alone, clocks of each of issue.PIPES, loops within].
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.dry import Launch
from benchmarks.roofline import issue, sass
from benchmarks.roofline.assumptions import Gpu
from benchmarks.roofline.issue import PIPES
from benchmarks.roofline.notes import Note
from benchmarks.roofline.predict import name_of, program
from tests.triton_kernels.aot import Recorder, resources


def sources(launches: Iterable[Launch], gpu: Gpu) -> dict[str, str]:
    """Hash of the source of each kernel and of all of ours that it calls; nothing is compiled."""
    return {name_of(launch): _recorded(launch, gpu, compile=False)[0] for launch in launches}


def figures(noted: Iterable[tuple[Launch, Note]], gpu: Gpu) -> dict[str, dict]:
    """Of every kernel that is launched, compiled here."""
    found: dict[str, dict] = {}
    for launch, note in noted:
        if (name := name_of(launch)) in found:
            continue
        source, kernel = _recorded(launch, gpu, compile=True)
        if isinstance(kernel, Exception):
            raise RuntimeError(f"{name}: {kernel}")
        said, loops = resources(kernel), sass.read(kernel.asm["cubin"])
        found[name] = {
            "source": source,
            **{key: said[key] for key in ("registers", "shared", "warps")},
            "instructions": loops.shown(),
            "cost": costs(loops, said["warps"], gpu, note),
        }
    return found


def costs(loops: sass.Loop, warps: int, gpu: Gpu, note: Note) -> list:
    """The tree of a kernel's costs. Loads wait for memory as far as the bytes come from there, else for the cache."""

    def tree(loop: sass.Loop, latency: float, repeats: bool) -> list:
        fills = any(inner.copies for inner in loop.inner)
        cost = issue.cost(loop.body, warps, gpu, latency, note.reuse, note.copy_bytes, fills, repeats)
        inner = [tree(inner, latency, True) for inner in loop.inner]
        return [round(cost.time, 1), [round(cost.busy[pipe], 1) for pipe in PIPES], inner]

    near, far = gpu.latencies["l2"], gpu.latencies["hbm"]
    once = tree(loops, near, False)
    try:
        loaded = program(once, note.turns).busy["l2"] * gpu.l2_clock * note.programs
    except ValueError:
        return once  # predict.block_cost says what is wrong with the note
    return tree(loops, near + min(1.0, note.hbm / max(1.0, loaded)) * (far - near), False)


def _recorded(launch: Launch, gpu: Gpu, compile: bool) -> tuple[str, object]:
    with Recorder(gpu.target, compile) as recorder:
        launch.function.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    (source,) = recorder.launches.values()
    return source, next(iter(recorder.kernels.values()), None)
