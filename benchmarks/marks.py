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


Row = Callable[[str], "dict | None"]  # of a case at the size of the marks, by peer


@dataclass(frozen=True)
class Mark:
    title: str
    required: str
    case: str
    measured: Callable[[Row, str], float | None]  # of a contender
    met: Callable[[float], bool]
    shown: str = "{:.1f}"
    stage: str | None = None
    against: str | None = None  # the peer that it compares with


def _value(column: str, scale: float = 1.0) -> Callable[[Row, str], float | None]:
    def read(row: Row, peer: str) -> float | None:
        found = row(peer)
        return found[column] * scale if found and column in found else None

    return read


def _times(other: str, inverse: bool = False) -> Callable[[Row, str], float | None]:
    """Time of another peer over ours in the same run, or ours over the other's."""

    def read(row: Row, peer: str) -> float | None:
        ours, theirs = row(peer), row(other)
        if not ours or not theirs:
            return None
        ratio = theirs["p50_ms"] / ours["p50_ms"]
        return 1 / ratio if inverse else ratio

    return read


def _against(case: str, other: str, inverse: bool = False) -> dict:
    return dict(case=case, measured=_times(other, inverse), against=other)


RATE = _value("percent_of_ceiling")
MARKS = (
    Mark("step, rho 0.02", "18 ms or less (aim 12)", "step_rho_0.02", _value("p50_ms"), lambda v: v <= 18, "{:.1f} ms"),
    Mark(
        "the same against published", "12x or more (aim 20x)", met=lambda v: v >= 12, shown="{:.1f}x",
        **_against("step_rho_0.02", "published"),
    ),
    Mark("step, rho 1", "50 ms or less (aim 40)", "step_rho_1", _value("p50_ms"), lambda v: v <= 50, "{:.1f} ms"),
    Mark(
        "dense statistics", "55 % or more of torch.mm's rate", "stages_rho_1", RATE, lambda v: v >= 55, "{:.0f} %",
        stage="statistics",
    ),
    Mark(
        "dense gradient", "50 % or more of torch.mm's rate", "stages_rho_1", RATE, lambda v: v >= 50, "{:.0f} %",
        stage="gradient",
    ),
    Mark(
        "peak extra memory, rho 0.02", "1.0 GiB or less", "step_rho_0.02", _value("peak_bytes", 1 / GIB),
        lambda v: v <= 1.0, "{:.2f} GiB",
    ),
    Mark(
        "search, upper triangles", "60 % or more of torch.mm's rate", "search", RATE, lambda v: v >= 60, "{:.0f} %",
    ),
    Mark(
        "top-16 against q @ k.T alone", "2x its time or less", met=lambda v: v <= 2, shown="{:.2f}x",
        **_against("topk", "torch.mm", inverse=True),
    ),
    Mark(
        "top-16 against torch.topk", "4x faster or more", met=lambda v: v >= 4, shown="{:.1f}x",
        **_against("topk", "torch.topk"),
    ),
    Mark("local_mix", "60 % or more of the copy rate", "local_mix", RATE, lambda v: v >= 60, "{:.0f} %"),
)  # fmt: skip


def contest() -> dict[str, list[str]]:
    """{case: peers} that the marks need, and no more: each backend by name, and whom a mark compares with."""
    cases = {mark.case: list(BACKENDS) for mark in MARKS}
    for mark in MARKS:
        cases[mark.case] += [mark.against] if mark.against else []
    return cases


def _row(run: dict, case: str, peer: str, stage: str | None = None) -> dict | None:
    row = tidy.find(run, case, peer, stage)
    return row if row and row["N"] == ROWS else None


def table(run: dict) -> list[list[str]]:
    """Rows of: mark, required, by, measured, met. Contenders without figures in the run have no rows."""
    shown = {row["peer"] for row in run["rows"] if row["status"] == tidy.OK} & {*OURS, *BACKENDS} or set(OURS)
    rows = []
    for mark in MARKS:
        for peer in (*OURS, *BACKENDS):
            if peer not in shown:
                continue
            value = mark.measured(lambda peer, mark=mark: _row(run, mark.case, peer, mark.stage), peer)
            found = (
                ("not measured yet", "")
                if value is None
                else (mark.shown.format(value), "yes" if mark.met(value) else "no")
            )
            rows.append([mark.title, mark.required, peer, *found])
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
