"""Curves of log.csv: which numbers there are, and where their lines run on a chart."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

POINTS = 240  # of a line: more than a chart has pixels for
WIDTH, HEIGHT = 420, 190  # of a chart, in the units of its view box
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 10, 24  # margins of the part where lines run
NOT_DRAWN = ("step", "images_per_s", "seconds")
TITLES = {"loss": "loss", "lambda": "task-specific weight", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class Line:
    """One run's numbers on a chart: as logged, thin, and smoothed. SVG path data, and the points for the pointer."""

    run: int
    raw: str
    smooth: str
    last: str
    steps: list[int]
    values: list[str]
    places: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of one column of the logs. Ticks: (place, text)."""

    name: str
    title: str
    lines: list[Line]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def read_log(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, values) of every column of a log.csv that holds numbers, in its order; nothing where there is no file.

    Cells that are empty, cut off or no finite number are left out: the last line of a run that was killed may be.
    """
    columns: dict[str, list[tuple[int, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            for row in reader:
                if not (row.get("step") or "").isdigit() or row.get(names[-1]) is None:
                    continue
                for name in names:
                    value = _number(row.get(name))
                    if value is not None:
                        columns.setdefault(name, []).append((int(row["step"]), value))
            ordered = [name for name in names if name in columns]
    except (OSError, csv.Error):
        return {}
    return {
        name: (np.array([step for step, _ in columns[name]]), np.array([value for _, value in columns[name]]))
        for name in ordered
    }


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def charts(logs: Sequence[dict[str, tuple[np.ndarray, np.ndarray]]]) -> list[Chart]:
    """A chart for the loss, one for each of its terms, then the norm of the gradient and what else changed; the same
    column of several runs is on one chart."""
    names = list(dict.fromkeys(name for log in logs for name in log))
    shown = [name for name in names if name not in NOT_DRAWN and not name.startswith("seconds_")]
    made = []
    for name in shown:
        held = {run: log[name] for run, log in enumerate(logs) if name in log}
        if name != "loss":  # what a method has no use for stays at one value
            held = {run: numbers for run, numbers in held.items() if np.ptp(numbers[1])}
        if held:
            made.append(_chart(name, held))
    return made


def _chart(name: str, held: dict[int, tuple[np.ndarray, np.ndarray]]) -> Chart:
    series = {run: _thinned(*numbers) for run, numbers in held.items()}
    low, high = _range(np.concatenate([values for _, values in series.values()]))
    first = min(int(steps[0]) for steps, _ in held.values())
    last = max(int(steps[-1]) for steps, _ in held.values())

    def x(step: float) -> float:
        return round(LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for run, (steps, values) in series.items():
        smooth = smoothed(values)
        places = [(x(step), y(value)) for step, value in zip(steps.tolist(), smooth.tolist())]
        lines.append(
            Line(
                run,
                path([(x(step), y(value)) for step, value in zip(steps.tolist(), values.tolist())]),
                path(places),
                text_of(float(smooth[-1])),
                steps.tolist(),
                [text_of(value) for value in smooth.tolist()],
                places,
            )
        )
    return Chart(
        name,
        TITLES.get(name, name.replace("_", " ")),
        lines,
        [(x(step), f"{step:g}") for step in ticks(first, last, 5) if float(step).is_integer()],
        [(y(value), text_of(value)) for value in ticks(low, high, 4)],
    )


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of them: the means of as many stretches."""
    if len(steps) <= POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), POINTS + 1).round().astype(int)
    counts = np.diff(edges)
    middles = steps[edges[:-1] + counts // 2]
    return middles, np.add.reduceat(values, edges[:-1]) / counts


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the line around each point, over what there is of it at the ends."""
    reach = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centres = np.arange(len(values))
    radius = np.minimum(reach, np.minimum(centres, len(values) - 1 - centres))
    return (sums[centres + radius + 1] - sums[centres - radius]) / (2 * radius + 1)


def _range(values: np.ndarray) -> tuple[float, float]:
    """The lowest and highest value to draw, with a little room; a lone extreme, as in a first step, may run out."""
    low, high = np.quantile(values, (0.0, 1.0)).tolist()
    inner_low, inner_high = np.quantile(values, (0.02, 0.98)).tolist()
    inner = inner_high - inner_low
    low, high = max(low, inner_low - inner), min(high, inner_high + inner)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def text_of(value: float) -> str:
    """A number as people write it: three digits, and no exponent where there is a shorter way."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def path(places: Sequence[tuple[float, float]]) -> str:
    """SVG path data of a line through the places."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
