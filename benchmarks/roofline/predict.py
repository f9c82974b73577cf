"""Predicted times of launches, stages and cases, from the figures of the kernels. Nothing here is measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import dry
from benchmarks.roofline import notes
from benchmarks.roofline.assumptions import Gpu
from benchmarks.roofline.issue import PIPES, Cost
from benchmarks.roofline.jobs import Job, Stage
from benchmarks.roofline.notes import Note, Problem


@dataclass
class Piece:
    """Launches of one part of a stage."""

    seconds: float = 0.0
    launches: int = 0
    bound: str = ""
    longest: float = 0.0  # seconds that are bound so
    operations: float = 0.0  # of the matrix units
    l2_bytes: float = 0.0

    def add(self, seconds: float, bound: str, launches: int = 1) -> None:
        self.seconds += seconds
        self.launches += launches
        if seconds > self.longest:
            self.longest, self.bound = seconds, bound


@dataclass
class Prediction:
    """Of a stage: its parts by name, torch calls among them."""

    stage: Stage
    parts: dict[str, Piece] = field(default_factory=lambda: defaultdict(Piece))

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def bound(self) -> str:
        return max(self.parts.values(), key=lambda part: part.seconds, default=Piece()).bound


def name_of(launch: dry.Launch) -> str:
    """Kernel, dtype of its first operand, compile-time options, and the numbers that Triton compiles in or takes for no
    multiple of 16: launches of one name share one machine code."""
    options = " ".join(f"{key}={value}" for key, value in sorted(launch.options.items()))
    first = next((x.dtype for x in launch.arguments if hasattr(x, "dtype")), "")
    given = zip(launch.function.arg_names, launch.arguments)
    numbers = {key: value for key, value in given if isinstance(value, int)}
    special = "".join(f" {key}=1" if value == 1 else f" {key}%16" for key, value in numbers.items() if value % 16)
    return f"{launch.name} {str(first).removeprefix('torch.')} {options}".rstrip() + special


def noted(launches: Sequence[dry.Launch], problem: Problem) -> list[tuple[dry.Launch, Note]]:
    same: dict[str, int] = defaultdict(int)
    for launch in launches:
        same[launch.name] += 1
    return [(launch, notes.note(launch, problem, same[launch.name])) for launch in launches]


def program(tree: list, turns: tuple) -> Cost:
    """What one block costs, whose loops take these turns: a number a loop, or (number, turns of the loops within)."""
    time, busy, inner = tree
    if len(inner) != len(turns):
        raise ValueError(f"{len(inner)} loops, but the note has turns of {len(turns)}")
    total = Cost(time, dict(zip(PIPES, busy)))
    for loop, of_loop in zip(inner, turns):
        number, *within = of_loop if isinstance(of_loop, tuple) else (of_loop,)
        total = total.plus(program(loop, tuple(within if number else _none(loop))), number)
    return total


def _none(tree: list) -> tuple:
    """No turns of any loop within."""
    return tuple(0 for _ in tree[2])


def operations(block: Cost, gpu: Gpu) -> float:
    """Of a block's matrix instructions."""
    return block.busy["matrix"] * gpu.matrix_share * gpu.matrix_clock


def resident(figures: dict, gpu: Gpu) -> int:
    """Blocks of a kernel that a processor holds at a time."""
    threads = 32 * figures["warps"]
    registers = -(-figures["registers"] // 8) * 8 * threads  # given out in eights
    shared = figures["shared"] + gpu.shared_reserved
    return max(1, min(gpu.registers // registers, gpu.shared_bytes // shared, gpu.threads // threads, gpu.blocks))


def block_cost(figures: dict, launch: dry.Launch, note: Note, gpu: Gpu) -> Cost:
    """Of one block. The turns of its note have to fit the loops, and amount to the matrix operations that it states."""
    try:
        block = program(figures["cost"], note.turns)
    except ValueError as error:
        raise notes.Unfit(f"{launch.name}: {error}") from error
    found = operations(block, gpu)
    if abs(found - note.products) > 0.03 * note.products:
        raise notes.Unfit(
            f"{launch.name}: a block makes {found:.4g} operations by its turns, {note.products:.4g} noted"
        )
    return block


def launch_time(figures: dict, block: Cost, note: Note, gpu: Gpu) -> tuple[float, str]:
    """Seconds without the launch itself, and what binds them.

    Blocks of a processor overlap as well as can be: as many as it holds take as long as one alone, or as long as all of
    them keep their busiest pipe. Memory and the second-level cache serve all processors: bytes at their rates.
    """
    pipe, busy = max(block.busy.items(), key=lambda item: item[1])
    alone, held = block.time + gpu.block_start, resident(figures, gpu)
    blocks = math.ceil(note.programs / gpu.processors)  # of the busiest processor
    full, rest = (blocks / held, 0) if note.shared_work and blocks > held else divmod(blocks, held)
    clocks = full * max(alone, held * busy) + (max(alone, rest * busy) if rest else 0.0)
    served = {"HBM": note.hbm / gpu.hbm, "L2": note.programs * block.busy["l2"] * gpu.l2_clock / gpu.l2}
    slower, seconds = max(served.items(), key=lambda item: item[1])
    if seconds > clocks / gpu.clock:
        return seconds, slower
    if alone >= held * busy:
        return clocks / gpu.clock, f"latency, {held} block{'s' * (held > 1)} a processor"
    return clocks / gpu.clock, {"shared": "shared memory", "l2": "L2 port", "issue": "issue"}.get(pipe, f"{pipe} pipe")


def predict(job: Job, step: dry.Step, figures: dict[str, dict], gpu: Gpu) -> list[Prediction]:
    """Of each stage of the job. figures: of all its kernels (kernels.figures)."""
    found = {stage.title: Prediction(stage) for stage in job.stages}
    for launch, note in noted(step.launches, job.problem):
        kernel, parts = figures[name_of(launch)], found[job.stage_of(launch.op).title].parts
        block = block_cost(kernel, launch, note, gpu)
        seconds, bound = launch_time(kernel, block, note, gpu)
        part = parts[note.part or launch.name.strip("_")]
        part.add(seconds + gpu.launch, bound)
        part.operations += note.programs * operations(block, gpu)
        part.l2_bytes += note.programs * block.busy["l2"] * gpu.l2_clock
    for call in step.calls:
        if call.kind == "work":
            product, moved = call.products / gpu.matrix, call.moved / gpu.hbm
            bound = "launches" if max(product, moved) < gpu.launch else "HBM" if moved > product else "matrix pipe"
            part = found[job.stage_of(call.op, call).title].parts["torch calls"]
            part.add(max(product, moved) + gpu.launch, bound)
    return list(found.values())


def floor(job: Job, stage: Stage, gpu: Gpu) -> float:
    """Seconds of the least work, at the rates of a library product and of a copy."""
    flop, moved = job.least(stage)
    return max(flop / gpu.matrix, moved / gpu.hbm)
