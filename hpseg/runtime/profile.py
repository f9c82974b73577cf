"""Where a training step spends its time: `with stage("head"): ...`, which does nothing unless a Profile is running.

A stage's seconds are its own: what runs inside a stage of another name is that one's. On a GPU every change of stage
waits for the device, so that work is charged to the stage that asked for it; a profiled run is slower for that reason.
Inside "loss" and "backward" the ops of hpkernels are told apart as they are dispatched: the searches for positives, and
the gradient of the loss's statistics. In "periodic", what a run does every so many steps, nothing is told apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import fmean, median
from typing import TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
STAGES = (
    "data",  # waiting for decoded views, and bringing them to the device
    "backbone",
    "head",  # codes of both heads, local mixing, projection
    "search",
    "loss",
    "loss_gradient",  # of the losses of hpkernels, for all pairs
    "backward",  # the rest of the backward pass
    "optimizer",
    "periodic",  # pools, previews, checkpoints, scores: what is due after a step counts for the next one
    "other",
)
SEARCH = ("search", "loss", "loss_gradient")  # what finding positives and contrasting them costs
STAGE_OF_OP = {
    "max_similarity": "search",
    "topk_similarity": "search",
    "pairs_above": "search",
    "pairs_from_indices": "search",
    "contrastive_grad": "loss_gradient",
    "normalize_rows_grad": "loss_gradient",
}
WARM_UP = 3  # steps that the table leaves out

_running: Profile | None = None


def profiling(wanted: bool, device: torch.device) -> AbstractContextManager[Profile | None]:
    """A context with a running Profile in it, or with None."""
    return Profile(device) if wanted else nullcontext()


def stage(name: str) -> AbstractContextManager:
    """A context whose time goes to stage `name` of the running profile."""
    return nullcontext() if _running is None else _running.stage(name)


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """`items`, the time that getting them takes in stage `name`."""
    iterator, end = iter(items), object()
    while True:
        with stage(name):
            item = next(iterator, end)
        if item is end:
            return
        yield item


class Profile:
    """Seconds by stage, step by step, of the code that runs inside `with profile:`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, float]] = []
        self._stack = ["other"]
        self.restart()

    def __enter__(self) -> Profile:
        global _running
        _running = self
        return self

    def __exit__(self, *_) -> None:
        global _running
        _running = None

    def restart(self) -> None:
        """Begins a step now; what came before belongs to none."""
        self._seconds, self._since = dict.fromkeys(STAGES, 0.0), self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _charge(self) -> None:
        """Time up to now goes to the innermost stage."""
        now = self._now()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append("periodic" if "periodic" in self._stack else name)
        try:
            # Nowhere else: torch.compile does not run compiled code while a dispatch mode watches.
            with _Ops(self) if name in ("loss", "backward") else nullcontext():
                yield
        finally:
            self._charge()
            self._stack.pop()

    def step(self) -> dict[str, float]:
        """Ends a step: its seconds by stage. What follows belongs to the next step."""
        self._charge()
        seconds, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        self.steps.append(seconds)
        return seconds

    def summary(self) -> dict[str, dict[str, float]]:
        """Median and mean milliseconds of every stage, of "step" as a whole and of "search and loss" (SEARCH)."""
        steps = self.steps[WARM_UP:] or self.steps
        rows = {name: [step[name] for step in steps] for name in STAGES}
        rows["search and loss"] = [sum(step[name] for name in SEARCH) for step in steps]
        rows["step"] = [sum(step.values()) for step in steps]
        return {
            name: {"median_ms": 1e3 * median(seconds), "mean_ms": 1e3 * fmean(seconds)}
            for name, seconds in rows.items()
            if steps
        }

    def table(self) -> str:
        """The summary as lines of text; shares are of the median step."""
        summary, counted = self.summary(), len(self.steps[WARM_UP:] or self.steps)
        if not summary:
            return "profile: no step was made"
        whole = summary["step"]["median_ms"]
        lines = [f"time of a step: median and its share, mean; {counted} steps"]
        lines.append(f"{'stage':<16}{'ms':>10}{'share':>8}{'mean ms':>10}")
        for name, row in summary.items():
            middle, mean = row["median_ms"], row["mean_ms"]
            lines.append(f"{name.replace('_', ' '):<16}{middle:>10.1f}{middle / whole:>8.1%}{mean:>10.1f}")
        return "\n".join(lines)


class _Ops(TorchDispatchMode):
    """Charges ops of hpkernels to their stages, also those of a backward pass, in whichever thread it runs."""

    def __init__(self, profile: Profile):
        super().__init__()
        self.profile = profile

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = STAGE_OF_OP.get(func._opname) if func.namespace == "hpkernels" else None
        if name is None:
            return func(*args, **(kwargs or {}))
        with self.profile.stage(name):
            return func(*args, **(kwargs or {}))
