"""Time and memory of a step against N, log-log, from a results file. matplotlib is imported to draw only."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks import results as tidy
from benchmarks.plan import CASES, STREAMS

COLORS = {
    "hpkernels": "#c1272d",
    "hpkernels-triton": "#e8837a",
    "hpkernels-cuda": "#7a0c12",
    "published": "#404040",
    "published-compiled": "#8c8c8c",
    "chunked": "#1f5fa8",
    "chunked-compiled": "#7fb0e6",
}


def why_not() -> str | None:
    """The reason plots cannot be drawn here, or None."""
    return None if importlib.util.find_spec("matplotlib") else "matplotlib is not installed (pip install '.[bench]')"


def series(run: dict, column: str) -> dict[str, list[tuple[int, float]]]:
    """{peer: [(N, value)]} of the steps that differ from the scaling case's in N alone."""
    (like,) = {
        (s.tokens, s.channels, s.code, s.pool, s.rate, s.density)
        for s in CASES["scaling_n"].shapes(run["setting"]["device"], run["setting"]["quick"])
    }
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run["rows"]:
        if row["kind"] != "step" or row["status"] != tidy.OK or column not in row:
            continue
        if tuple(row[name] for name in ("T", "C", "D", "pool", "rho", "density")) == like:
            found.setdefault(row["peer"], []).append((row["N"], row[column]))
    return {peer: sorted(set(points)) for peer, points in sorted(found.items()) if len({n for n, _ in points}) > 1}


def files(folder: Path, device: str) -> tuple[Path, Path]:
    return folder / f"{device}_time.svg", folder / f"{device}_memory.svg"


def draw(folder: Path) -> list[Path]:
    """Two plots for each results file in the folder that has more than one N; returns the files written."""
    written = []
    for device in ("cpu", "cuda"):
        run = tidy.load(folder / f"{device}.json")
        if run is None:
            continue
        time, memory = files(folder, device)
        if times := series(run, "p50_ms"):
            written.append(_plot(times, "milliseconds a step (forward, backward, search)", 1.0, time, run))
        if sizes := series(run, "peak_bytes"):
            written.append(_plot(sizes, "peak extra memory, MiB", 2**-20, memory, run))
    return written


def _plot(found: dict[str, list[tuple[int, float]]], label: str, scale: float, file: Path, run: dict) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "hpkernels", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")
        for peer, points in found.items():
            ours = peer.startswith("hpkernels")
            axes.loglog(
                [n for n, _ in points], [scale * value for _, value in points],
                marker="o", markersize=4, linewidth=2.2 if ours else 1.4, color=COLORS.get(peer), label=peer,
            )  # fmt: skip
        axes.set_xlabel("patches, N")
        axes.set_ylabel(label)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(frameon=False)
        where = run["versions"]["gpu"] if run["setting"]["device"] == "cuda" else run["versions"]["cpu"]
        axes.set_title(
            f"{where}, {run['setting']['dtype']}, rho 0.02, {STREAMS} streams, commit {run['commit']}", fontsize=8
        )
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return file
