"""The predictions as a table and as benchmarks/results/roofline.json, and what the next change is held to."""

from __future__ import annotations

import ast
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import dry
from benchmarks import results as measurements
from benchmarks.roofline import predict
from benchmarks.roofline.assumptions import GPUS, Gpu
from benchmarks.roofline.jobs import BY_HAND, JOBS, WHOLE, Job
from benchmarks.roofline.notes import Unfit
from benchmarks.roofline.predict import Prediction

FOLDER = Path(__file__).resolve().parents[1] / "results"
RESULTS, MEASURED = FOLDER / "roofline.json", FOLDER / "cuda.json"
GROWTH = 1.1  # of a stage's prediction over its bound, unnoticed
RECOMPILED = 2  # kernels that a check compiles, those of the shortest machine code
TOTAL = "total"


@dataclass
class Table:
    gpu: str
    figures: dict[str, dict]
    steps: dict[str, dry.Step]
    predictions: dict[str, list[Prediction]]  # by case

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """By case and stage."""
        found = {}
        for job in JOBS:
            stages = {p.stage.title: 1e3 * p.seconds for p in self.predictions[job.case] if p.parts}
            total = {TOTAL: sum(stages.values())}
            found[job.case] = {k: round(v, 4) for k, v in (total if job.stages is WHOLE else stages | total).items()}
        return found


def make(gpu: str, figures: dict[str, dict] | None = None) -> Table:
    """figures: None compiles all kernels."""
    steps = {job.case: job.run(job.shape) for job in JOBS}
    try:
        if figures is None:
            from benchmarks.roofline import kernels

            noted = [pair for job in JOBS for pair in predict.noted(steps[job.case].launches, job.problem)]
            figures = kernels.figures(noted, GPUS[gpu])
        predictions = {job.case: predict.predict(job, steps[job.case], figures, GPUS[gpu]) for job in JOBS}
    except Unfit as error:
        raise SystemExit("\n".join(_unfit(steps, gpu) or [str(error)])) from error
    return Table(gpu, figures, steps, predictions)


def _unfit(steps: dict[str, dry.Step], gpu: str) -> list[str]:
    """All kernels whose notes are to be written, with what they are written from."""
    from benchmarks.roofline import kernels, notes

    wrong = [line for job in JOBS for line in kernels.unfit(steps[job.case].launches, job.problem, GPUS[gpu])]
    return [*dict.fromkeys(wrong), f"Notes are in {notes.__file__}"] if wrong else []


# ------------------------------------------------------------------ shown


def lines(table: Table) -> Iterator[str]:
    """Markdown."""
    gpu = GPUS[table.gpu]
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else None
    yield f"Predicted for {table.gpu}, ms, from machine code of Triton {importlib.metadata.version('triton')}. "
    yield f'"By hand" was predicted, too. {"Measured: " + measured["date"] if measured else "Nothing was measured"}.'
    for job in JOBS:
        yield from ("", f"**{job.case}**", "")
        yield "| stage | floor | predicted | bound by | by hand, before | measured |"
        yield "|---|---|---|---|---|---|"
        yield from _rows(job, table, gpu, measured)
        step = table.steps[job.case]
        launches, calls = len(step.launches), step.torch_calls()
        host = 1e3 * (launches * gpu.host_launch + calls * gpu.host_call)
        yield ""
        yield f"{launches} launches and {calls} torch calls: predicted {host:.1f} ms of the host."


def _rows(job: Job, table: Table, gpu: Gpu, measured: dict | None) -> Iterator[str]:
    def row(
        name: str, least: float | None, seconds: float, bound: str, found: float | None = None, under: str = ""
    ) -> str:
        hand = BY_HAND.get(job.case, {}).get(under + name)
        shown = f"**{name}**" if name == TOTAL else f"- {name}" if under else name
        numbers = [_shown(least and 1e3 * least), _shown(1e3 * seconds), bound, _shown(hand), _shown(found)]
        return f"| {shown} | " + " | ".join(numbers) + " |"

    predictions = [prediction for prediction in table.predictions[job.case] if prediction.parts]
    seconds = sum(prediction.seconds for prediction in predictions)
    least = sum(predict.floor(job, prediction.stage, gpu) for prediction in predictions)
    for prediction in predictions if job.stages is not WHOLE else ():
        stage = prediction.stage
        found = _measured(measured, job.case, stage.measured) if measured and stage.measured else None
        yield row(stage.title, predict.floor(job, stage, gpu), prediction.seconds, prediction.bound, found)
        parts = sorted(prediction.parts.items(), key=lambda item: -item[1].seconds)
        for name, part in parts if len(parts) > 2 else ():
            yield row(name, None, part.seconds, part.bound, None, f"{stage.title}: ")
    found = _measured(measured, job.case, ()) if measured else None
    yield row(TOTAL, least, seconds, max(predictions, key=lambda p: p.seconds).bound, found)


def _measured(run: dict, case: str, stages: tuple[str, ...]) -> float | None:
    """ms: of the whole case, or of the stages of a step."""
    if not stages:
        row = measurements.find(run, case, "hpkernels-triton")
        return row["p50_ms"] if row else None
    rows = [measurements.find(run, case.replace("step", "stages"), "hpkernels-triton", stage) for stage in stages]
    return sum(row["p50_ms"] for row in rows if row) if any(rows) else None


def _shown(value: float | None) -> str:
    return "" if not value else f"{value:.2f}"


def kernel_lines(table: Table) -> Iterator[str]:
    """What a block of each kernel costs, in clocks of a processor."""
    gpu = GPUS[table.gpu]
    yield from (
        "",
        "| kernel | grid | registers | shared | blocks a processor | loops | turns | alone | busiest pipes |",
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    seen = set()
    for job in JOBS:
        for launch, note in predict.noted(table.steps[job.case].launches, job.problem):
            if (name := predict.name_of(launch)) in seen:
                continue
            seen.add(name)
            kernel = table.figures[name]
            block = predict.block_cost(kernel, launch, note, gpu)
            pipes = sorted(block.busy.items(), key=lambda item: -item[1])[:3]
            fields = [
                name, launch.grid, kernel["registers"], kernel["shared"], predict.resident(kernel, gpu),
                kernel["instructions"], _turns(note.turns), f"{block.time:.0f}",
                ", ".join(f"{pipe} {clocks:.0f}" for pipe, clocks in pipes),
            ]  # fmt: skip
            yield "| " + " | ".join(map(str, fields)) + " |"


def _turns(turns: tuple) -> str:
    return " ".join(f"{t[0]:.3g}({_turns(t[1:])})" if isinstance(t, tuple) else f"{t:.3g}" for t in turns)


# ------------------------------------------------------------------ written, and held to


def grown(now: dict[str, dict[str, float]], bounds: dict[str, dict[str, float]]) -> list[str]:
    """Stages whose prediction is beyond GROWTH times their bound."""
    return [
        f"{case}, {title}: predicted {value:.3f} ms, {bounds[case][title]:.3f} before"
        for case, stages in now.items()
        for title, value in stages.items()
        if title in bounds.get(case, {}) and value > GROWTH * bounds[case][title]
    ]


def as_json(table: Table, before: dict, accept: bool) -> str:
    """The file's text. A stage's bound is the least that was ever written for it, until growth is accepted."""
    now, old = table.milliseconds(), before.get(table.gpu, {}).get("bounds_ms", {})
    bounds = {
        case: {
            title: value if accept else min(value, old.get(case, {}).get(title, value)) for title, value in of.items()
        }
        for case, of in now.items()
    }
    head = {
        "command": "python -m benchmarks.roofline --write",
        "date": datetime.date.today().isoformat(),
        "triton": importlib.metadata.version("triton"),
        "torch": torch.__version__,
        "note": "predicted from machine code; nothing here was measured",
    }
    of_gpu = {"model": model_hash(), "predicted_ms": now, "bounds_ms": bounds, "kernels": table.figures}
    return json.dumps(before | head | {table.gpu: of_gpu}, indent=1, sort_keys=True) + "\n"


def model_hash() -> str:
    """Of the code, without comments, by which kernels become figures."""
    files = (Path(__file__).parent / f"{name}.py" for name in ("assumptions", "issue", "kernels", "sass"))
    return hashlib.sha256("".join(ast.unparse(ast.parse(file.read_text())) for file in files).encode()).hexdigest()[:16]


def check(gpu: str) -> list[str]:
    """What is wrong with the results file: other kernels than those of now, another prediction, a stage that grew."""
    from benchmarks.roofline import kernels

    file = json.loads(RESULTS.read_text())
    written, again = file[gpu], "run `python -m benchmarks.roofline --write`"
    noted = [p for job in JOBS for p in predict.noted(job.run(job.shape).launches, job.problem)]
    by_name = {predict.name_of(launch): (launch, note) for launch, note in reversed(noted)}
    sources = kernels.sources((launch for launch, _ in by_name.values()), GPUS[gpu])
    figures = written["kernels"]
    wrong = [f"{name}: no longer launched; {again}" for name in figures.keys() - sources.keys()]
    wrong += [
        f"{name}: changed or new; {again}"
        for name, source in sources.items()
        if figures.get(name, {}).get("source") != source
    ]
    if written["model"] != model_hash():
        wrong.append(f"the model has changed; {again}")
    if wrong:
        return wrong
    now = make(gpu, figures).milliseconds()
    if now != written["predicted_ms"]:
        wrong.append(f"notes, launches or assumptions have changed; {again}")
    wrong += grown(now, written["bounds_ms"])
    if file["triton"] == importlib.metadata.version("triton"):
        shortest = sorted(figures, key=lambda name: sum(figures[name]["cost"][1]))[:RECOMPILED]
        for name, made in kernels.figures((by_name[name] for name in shortest), GPUS[gpu]).items():
            if made != figures[name]:
                wrong.append(f"{name}: compiled anew, its figures are others; {again}")
    return wrong
