"""What is predicted: cases of a GPU run (benchmarks/plan.py), their stages, and what each has to do at the least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hpkernels
from benchmarks import dry
from benchmarks.cases import KINDS
from benchmarks.plan import CASES, NEIGHBOURS, Shape
from benchmarks.roofline.notes import UNIONS, Problem
from benchmarks.stages import work

ITEM = 2  # bytes of bf16
LARGE = 4 << 20  # bytes that a torch call moves: more than that, and its launch is the lesser part
SPARSE, DENSE = "step_rho_0.02", "step_rho_1"


@dataclass(frozen=True)
class Stage:
    """A part of a case: launches and torch calls of some ops, and torch calls in none."""

    title: str
    ops: tuple[str, ...]  # of hpkernels; "*": all that is left
    calls: str = ""  # torch calls outside of the ops that count here: "large" or "small" ones
    measured: tuple[str, ...] = ()  # stages of the measurements (benchmarks/stages.py) that are the same work
    least: tuple[str, ...] = ()  # stages whose work this is, as they count it


_NORMALIZE = ("normalize_rows", "normalize_rows_grad", "normalize_streams", "normalize_streams_grad")
STEP = (
    Stage("normalise, NaN check", _NORMALIZE, "large", ("normalise",), ("normalise",)),
    Stage("pools", ("max_similarity",), "", ("pools",), ("pools",)),
    Stage("random columns", ("random_bits",), "", ("random columns",), ("random columns",)),
    Stage("search, both graphs", ("pairs_above",), "", ("search",), ("search",)),
    Stage("counting bits, small calls", ("count_bits", "transpose_bits", "pair_average", "pair_average_grad"), "small"),
    Stage("statistics", ("contrastive_stats",), "", (), ("statistics",)),
    Stage("gradient", ("contrastive_grad",), "", (), ("gradient", "positives")),
)
WHOLE = (Stage("whole", ("*",), "all"),)


@dataclass(frozen=True)
class Job:
    case: str
    run: Callable[[Shape], dry.Step]
    stages: tuple[Stage, ...]

    @property
    def shape(self) -> Shape:
        return CASES[self.case].shapes("cuda", False)[0]

    @property
    def problem(self) -> Problem:
        return Problem(self.shape.rate, UNIONS)

    def stage_of(self, op: str, call: dry.Call | None = None) -> Stage:
        """Where a launch in `op`, or a torch call there or in no op, counts."""
        size = "large" if call is not None and call.moved >= LARGE else "small"
        for stage in self.stages:
            if op in stage.ops or "*" in stage.ops or (not op and stage.calls == size):
                return stage
        raise KeyError(f"{op}: no stage of {self.case} has this op; name it in {__file__}")

    def least(self, stage: Stage) -> tuple[float, float]:
        """Operations of the matrix units and bytes: nothing is done twice except logits, which are not kept."""
        if self.stages is WHOLE:
            kind = KINDS[CASES[self.case].kind]
            flop = kind.flop(self.shape) if kind.flop else {}
            return sum(flop.values()), kind.nbytes(self.shape, ITEM) if kind.nbytes else 0.0
        parts = [work(part, self.shape, self.shape.density, self.shape.density, ITEM) for part in stage.least]
        return sum(sum(flop.values()) for flop, _ in parts), sum(moved for _, moved in parts)


def _step(shape: Shape) -> dry.Step:
    return dry.loss_step(
        shape.rate, images=shape.images, tokens=shape.tokens, channels=shape.channels, code=shape.code, pool=shape.pool
    )


def _local_mix(shape: Shape) -> dry.Step:
    code = dry.like_gpu(shape.images, shape.tokens, shape.code, requires_grad=True)
    attention = dry.like_gpu(shape.images, shape.heads, shape.tokens, shape.tokens)
    return dry.follow(lambda: dry.backward(hpkernels.local_mix(code, attention, shape.grid, backend="triton").sum()))


def _topk(shape: Shape) -> dry.Step:
    x = dry.like_gpu(shape.rows, shape.channels)
    return dry.follow(lambda: hpkernels.topk_similarity(x, x, NEIGHBOURS, exclude_self=True, backend="triton"))


JOBS = (
    Job(SPARSE, _step, STEP),
    Job(DENSE, _step, STEP),
    Job("local_mix", _local_mix, WHOLE),
    Job("topk", _topk, WHOLE),
)

# ms, predicted for commit caa265b by reading the machine code of Triton 3.6, 2026-11-30; not measured either.
BY_HAND = {
    SPARSE: {
        "normalise, NaN check": 0.45, "pools": 0.35, "random columns": 0.03, "search, both graphs": 6.2,
        "counting bits, small calls": 0.5, "statistics": 1.6, "gradient": 13.4, "total": 22.0,
        "gradient: pairs of P and Q": 5.0, "gradient: random columns, row side": 1.5,
        "gradient: random columns, column side": 3.8, "gradient: column sums": 0.8, "gradient: empty windows": 1.8,
        "gradient: lists": 0.5,
    },
    DENSE: {"statistics": 19.0, "gradient": 32.0, "total": 59.0},
    "local_mix": {"total": 1.1},
    "topk": {"total": 4.1},
}  # fmt: skip
