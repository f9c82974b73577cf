"""The marks this library set itself for one large GPU, from a results file: `python -m benchmarks.marks [FOLDER]`.

They are for an H200, bf16, 64 images of 784 patches, C 384, D 512, pools of 2,048, P and Q 0.2 % dense: forward and
backward of both streams with the search. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results as tidy
from benchmarks.markdown import markdown
from benchmarks.plan import BACKENDS, OURS

ROWS = 50176
GIB = 2**30


@dataclass(frozen=True)
class Mark:
    title: str
    required: str
    measured: Callable[[dict, str], float | None]
    met: Callable[[float], bool]
    shown: str = "{:.1f}"


def _value(case: str, column: str, stage: str | None = None, scale: float = 1.0) -> Callable[[dict, str], float | None]:
    def read(run: dict, peer: str) -> float | None:
        row = _row(run, case, peer, stage)
        return row[column] * scale if row and column in row else None

    return read


def _times(case: str, other: str, inverse: bool = False) -> Callable[[dict, str], float | None]:
    """Time of another peer over ours in the same run, or ours over the other's."""

    def read(run: dict, peer: str) -> float | None:
        ours, theirs = _row(run, case, peer), _row(run, case, other)
        if not ours or not theirs:
            return None
        ratio = theirs["p50_ms"] / ours["p50_ms"]
        return 1 / ratio if inverse else ratio

    return read


def _row(run: dict, case: str, peer: str, stage: str | None = None) -> dict | None:
    row = tidy.find(run, case, peer, stage)
    return row if row and row["N"] == ROWS else None


MARKS = (
    Mark("step, rho 0.02", "18 ms or less (aim 12)", _value("step_rho_0.02", "p50_ms"), lambda v: v <= 18, "{:.1f} ms"),
    Mark(
        "the same against published", "12x or more (aim 20x)",
        _times("step_rho_0.02", "published"), lambda v: v >= 12, "{:.1f}x",
    ),
    Mark("step, rho 1", "50 ms or less (aim 40)", _value("step_rho_1", "p50_ms"), lambda v: v <= 50, "{:.1f} ms"),
    Mark(
        "dense statistics", "55 % or more of torch.mm's rate",
        _value("stages_rho_1", "percent_of_ceiling", "statistics"), lambda v: v >= 55, "{:.0f} %",
    ),
    Mark(
        "dense gradient", "50 % or more of torch.mm's rate",
        _value("stages_rho_1", "percent_of_ceiling", "gradient"), lambda v: v >= 50, "{:.0f} %",
    ),
    Mark(
        "peak extra memory, rho 0.02", "1.0 GiB or less",
        _value("step_rho_0.02", "peak_bytes", scale=1 / GIB), lambda v: v <= 1.0, "{:.2f} GiB",
    ),
    Mark(
        "search, upper triangles", "60 % or more of torch.mm's rate",
        _value("search", "percent_of_ceiling"), lambda v: v >= 60, "{:.0f} %",
    ),
    Mark(
        "top-16 against q @ k.T alone", "2x its time or less",
        _times("topk", "torch.mm", inverse=True), lambda v: v <= 2, "{:.2f}x",
    ),
    Mark("top-16 against torch.topk", "4x faster or more", _times("topk", "torch.topk"), lambda v: v >= 4, "{:.1f}x"),
    Mark(
        "local_mix", "60 % or more of the copy rate",
        _value("local_mix", "percent_of_ceiling"), lambda v: v >= 60, "{:.0f} %",
    ),
)  # fmt: skip


def table(run: dict) -> list[list[str]]:
    """Rows of: mark, required, by, measured, met. A backend without figures in the run has no rows."""
    rows = []
    for mark in MARKS:
        for peer in (*OURS, *BACKENDS):
            if peer not in OURS and not any(r["peer"] == peer and r["status"] == tidy.OK for r in run["rows"]):
                continue
            value = mark.measured(run, peer)
            shown = (
                ("not measured yet", "")
                if value is None
                else (mark.shown.format(value), "yes" if mark.met(value) else "no")
            )
            rows.append([mark.title, mark.required, peer, *shown])
    return rows


def render(run: dict) -> str:
    v, setting = run["versions"], run["setting"]
    where = f"{v.get('gpu', v['cpu'])}, {setting['dtype']}, commit {run['commit']}, {run['date']}"
    return f"Marks ({where}):\n\n" + markdown(["mark", "required", "by", "measured", "met"], table(run))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "results"
    run = tidy.load(folder / "cuda.json")
    print(render(run) if run else f"{folder / 'cuda.json'}: not measured yet")


if __name__ == "__main__":
    main()
