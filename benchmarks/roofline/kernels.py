"""The kernels of a step, compiled for a GPU that need not be there, as figures that a file can hold.

A kernel's figures: hash of its source, registers, shared memory, warps, and `cost`, a tree of the loops with what one
turn of each costs a block: [clocks alone, clocks of each of issue.PIPES, loops within].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.dry import Launch
from benchmarks.roofline import issue, notes, sass
from benchmarks.roofline.assumptions import Gpu
from benchmarks.roofline.issue import PIPES
from benchmarks.roofline.notes import Note, Problem
from benchmarks.roofline.predict import block_cost, name_of, program
from tests.triton_kernels.aot import Recorder, resources


def sources(launches: Iterable[Launch], gpu: Gpu) -> dict[str, str]:
    """Hash of the source of each kernel and of all of ours that it calls; nothing is compiled."""
    return {name_of(launch): _recorded(launch, gpu, compile=False)[0] for launch in launches}


def unfit(launches: Sequence[Launch], problem: Problem, gpu: Gpu) -> list[str]:
    """What to write a note from, of each kernel that has none or whose note does not fit."""
    found: dict[str, str] = {}
    for launch in launches:
        if (name := name_of(launch)) in found:
            continue
        try:
            note = notes.note(launch, problem)
            block_cost(figures([(launch, note)], gpu)[name], launch, note, gpu)
        except notes.Unfit as error:
            shown = sass.read(_recorded(launch, gpu, compile=True)[1].asm["cubin"]).shown()
            given = zip(launch.function.arg_names, launch.arguments)
            numbers = {key: value for key, value in given if isinstance(value, (int, float))}
            found[name] = f"{error}\n    {name}\n    loops {shown}, grid {launch.grid}, {numbers}"
    return list(found.values())


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

    def tree(loop: sass.Loop, latency: float, outer: sass.Loop | None) -> list:
        setting = issue.Setting(
            warps, latency, repeats=outer is not None and loop.repeats, fills=any(i.copies for i in loop.inner),
            ahead=_ahead(loop, outer), reuse=note.reuse, copy_bytes=note.copy_bytes,
        )  # fmt: skip
        cost = issue.cost(loop.body, gpu, setting)
        inner = [tree(inner, latency, loop) for inner in loop.inner]
        return [round(cost.time, 1), [round(cost.busy[pipe], 1) for pipe in PIPES], inner]

    near, far = gpu.latencies["l2"], gpu.latencies["hbm"]
    once = tree(loops, near, None)
    try:
        loaded = program(once, note.turns).busy["l2"] * gpu.l2_clock * note.programs
    except ValueError:
        return once  # predict.block_cost says what is wrong with the note
    return tree(loops, near + min(1.0, note.hbm / max(1.0, loaded)) * (far - near), None)


def _ahead(loop: sass.Loop, outer: sass.Loop | None) -> int:
    """Turns by which the bulk copies of a loop run ahead: as many as are made before it."""
    own, first = (sum(i.name == "UTMALDG" for i in part.body) if part is not None else 0 for part in (loop, outer))
    return max(1, first // own) if own else 1


def _recorded(launch: Launch, gpu: Gpu, compile: bool) -> tuple[str, object]:
    with Recorder(gpu.target, compile) as recorder:
        launch.function.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    (source,) = recorder.launches.values()
    return source, next(iter(recorder.kernels.values()), None)
