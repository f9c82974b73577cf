"""What eval.json holds, laid out for a page: scores beside the baselines, classes, the confusion matrix."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpseg.data.datasets import NAMES
from hpseg.evaluation.evaluate import SCORES, TITLES
from hpseg.reporting.about import Run, read_json

MATRIX_CLASSES = 48  # more cannot be read on a screen: the largest are shown
VISIBLE = 0.005  # share of a class, below which a cell of the matrix stays empty
SHOWN_BASELINE = "kmeans_features"


@dataclass(frozen=True)
class Bar:
    """A class: its IoU in percent in every run, None where it has none, and of the baseline."""

    name: str
    values: list[float | None]
    baseline: float | None


@dataclass(frozen=True)
class Cell:
    row: int
    column: int
    share: float  # of the pixels of the row's class
    text: str


@dataclass(frozen=True)
class Matrix:
    """Classes by row, by column the clusters matched to the same classes, then all other clusters as one."""

    names: list[str]
    columns: list[str]
    cells: list[Cell]
    left_out: int  # small classes that there was no room for


def read_scores(run: Run) -> dict[str, Any]:
    """RUN/eval.json, as `hpseg eval` writes it of one run; empty where there is none, or one of several runs."""
    results = read_json(run.folder / "eval.json")
    return results if "classes" in results and "cluster_of" in results.get("trained", {}) else {}


def about(results: dict[str, Any], data: str | Path, split: str = "val", void: int = 255) -> bool:
    """Whether scores are those on `data`. split: of a named data set; void: of a folder."""
    named = str(results.get("data", ""))
    if str(data) in NAMES:
        return named == str(data) and results.get("split") == split
    same = bool(named) and (named == str(data) or os.path.realpath(named) == os.path.realpath(data))
    return same and results.get("void") == void


def methods(results: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, float | None]]]]:
    """(name, title, scores) of the run's head and of its baselines; a score is (title, percent)."""
    held = [name for name in TITLES if name in results]
    shown = {title: key for title, key in SCORES.items() if key in results["trained"]}
    return [
        (name, TITLES[name], [(title, number(results[name].get(key))) for title, key in shown.items()]) for name in held
    ]


def number(value: Any) -> float | None:
    """A finite float, or None for what is no number, as the IoU of a class that is nowhere."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def bars(all_results: Sequence[dict[str, Any]]) -> list[Bar]:
    """The classes, best first by the first run's IoU. all_results: of runs that were scored on the same data."""
    first = all_results[0]
    by_run = [dict(zip(results["classes"], results["trained"]["iou"], strict=True)) for results in all_results]
    baseline = first.get(SHOWN_BASELINE, {}).get("iou", [None] * len(first["classes"]))
    found = [
        Bar(name, [number(of_class.get(name)) for of_class in by_run], number(other))
        for name, other in zip(first["classes"], baseline, strict=True)
    ]
    return sorted(found, key=lambda bar: -(bar.values[0] if bar.values[0] is not None else -1))


def matrix(results: dict[str, Any]) -> Matrix | None:
    """The confusion matrix of the trained head after matching, as shares of each class; None where eval.json, as an
    older one, has no counts."""
    counts = np.array(results["trained"].get("confusion", []), dtype=np.int64)
    cluster_of = np.array(results["trained"]["cluster_of"])
    names = results["classes"]
    if counts.ndim != 2 or counts.shape[1] != len(names) or len(cluster_of) != len(names):
        return None
    sizes = counts.sum(0)
    order = [c for c in np.argsort(-sizes, kind="stable").tolist() if sizes[c]][:MATRIX_CLASSES]
    if not order:
        return None
    order.sort()
    matched = np.where(cluster_of[order, None] >= 0, counts[cluster_of[order]], 0)[:, order].T  # (class, as class)
    shares = matched / sizes[order, None]
    columns = [names[c] for c in order]
    rest = 1 - shares.sum(1, keepdims=True)
    if (rest > VISIBLE).any():
        shares, columns = np.concatenate([shares, rest], 1), [*columns, "others"]
    cells = [
        Cell(int(row), int(column), round(float(shares[row, column]), 3), f"{100 * shares[row, column]:.0f}")
        for row, column in np.argwhere(shares >= VISIBLE)
    ]
    return Matrix([names[c] for c in order], columns, cells, int((sizes > 0).sum()) - len(order))
