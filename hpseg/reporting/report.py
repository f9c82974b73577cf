"""`hpseg report RUN [DATA] --out report.html`: what a run was and what it found, as one page that one can mail."""

from __future__ import annotations

import datetime
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpkernels import __version__
from hpseg.data.datasets import LABELS, NAMES, LabelledSet, open_data
from hpseg.evaluation.evaluate import evaluate, evaluate_runs
from hpseg.inference.label_map import Matching
from hpseg.inference.segmenter import Segmenter, load
from hpseg.reporting.about import Run, changed_settings, facts, kind_of, lead, notes
from hpseg.reporting.curves import charts
from hpseg.reporting.gallery import Seen, gallery, likeness, look
from hpseg.reporting.kept import Kept
from hpseg.reporting.page import PICTURE_BYTES, render
from hpseg.reporting.photographs import (
    Photographs,
    codes_of,
    draw,
    folder_photographs,
    judged,
    labelled_photographs,
    training_photographs,
)
from hpseg.reporting.scores import about, bars, matrix, methods, read_scores
from hpseg.run.errors import UsageError
from hpseg.run.files import require_file, write_atomically
from hpseg.run.folder import REPORT

logger = logging.getLogger(__name__)
MOST_PHOTOGRAPHS = 60
LOOKED_AT = 40  # photographs whose patches the gallery of clusters chooses among
JUDGED = 4  # best pictures, and as many worst ones
SHARES = (0.5, 0.7)  # of the time there is, when photographs are drawn, and when patches are chosen


def write_report(
    run: str | Path,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    compare: str | Path | None = None,
    n: int = 12,
    root: str | Path | None = None,
    split: str = "val",
    void: int = 255,
    seconds: float | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> Path:
    """Writes a page about the run in folder `run` and returns its path: one HTML file below 10 MB, which loads nothing.

    data: what to show and to score on, as `hpseg.evaluate` takes it with `root`, `split` and `void`; or a folder of
    photographs without labels. None shows training photographs, and the scores in RUN/eval.json if there are some.
    A run without scores is evaluated on labels, as by `hpseg eval`, which writes RUN/eval.json; one whose scores are on
    other data is evaluated for the page alone.
    out: None is RUN/report.html, which is replaced; another file that is there is an error unless `overwrite` is set.
    compare: a second run, whose scores, curves and label maps stand beside those of the first. Its clusters and its
    confusion matrix take the place of the first's by a switch.
    n: photographs to show, 1 to 60. seconds: about how long photographs are looked at; there are fewer of them where
    that is not enough for all. None looks at all.

    What a run lacks is left out: one that was interrupted has curves only. UsageError for a folder that is no run.
    """
    runs = [Run.read(Path(folder)) for folder in ([run] if compare is None else [run, compare])]
    if not 1 <= n <= MOST_PHOTOGRAPHS:
        raise UsageError(f"n: expected 1 to {MOST_PHOTOGRAPHS} photographs, got {n}")
    own = Path(run) / REPORT
    out = own if out is None else Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"out: expected a name that ends in .html, got {str(out)!r}")
    require_file("out", out, overwrite or os.path.realpath(out) == os.path.realpath(own))
    if data is not None and str(data) not in NAMES and not Path(data).is_dir():
        raise UsageError(f"data: expected a folder or one of {', '.join(NAMES)}, got {str(data)!r}")
    labelled = open_data(data, root, split, void) if data is not None and _has_labels(data) else None
    results = _scores(runs, data, labelled, dict(root=root, split=split, void=void, device=device))
    with _unsaid():  # the page says it
        segmenters = [load(one.folder, device) for one in runs if one.has_model and runs[0].has_model]
    if labelled is not None:
        for segmenter, scores in zip(segmenters, results):
            segmenter.matching = Matching.of(scores)
    content = _about(runs) | _scored(runs, results)
    start, budget = time.monotonic(), math.inf if seconds is None else seconds
    photographs = _photographs(runs[0], data, labelled)
    content |= _seen(runs, segmenters, photographs, n, [start + part * budget for part in SHARES])
    content |= _judged(results, labelled or _labelled_again(results), segmenters, start + budget)
    page = render(content).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def _has_labels(data: str | Path) -> bool:
    return str(data) in NAMES or any((Path(data) / name).is_dir() for name in LABELS)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Inside, what loading a run has to say of it is not said."""
    said = logging.getLogger("hpseg.inference.segmenter")
    before, said.disabled = said.disabled, True
    try:
        yield
    finally:
        said.disabled = before


def _scores(
    runs: list[Run], data: str | Path | None, labelled: LabelledSet | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The scores of every run, all on the same data; empty where there are none, for the second run also where its
    own are on other data."""
    found = []
    for run in runs:
        results = read_scores(run)
        if labelled is not None and data is not None and run.has_model:
            whole = (
                about(results, data, options["split"], options["void"])
                and "confusion" in results["trained"]
                and "pictures" in results
            )
            results = results if whole else _evaluated(run, data, options)
        found.append(results)
    one = found[0]
    if found[1:] and not (one and about(found[1], one["data"], one.get("split", "val"), one.get("void", 255))):
        found[1] = {}
    return found


def _evaluated(run: Run, data: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Scores on `data`. They stay in the run folder where there are none; others that are there are not replaced."""
    if any((run.folder / name).exists() for name in ("eval.json", "labels.json")):
        return evaluate_runs([run.folder], data, **options)[0]
    return evaluate(run.folder, data, **options)


def _photographs(run: Run, data: str | Path | None, labelled: LabelledSet | None) -> Photographs | None:
    """Those to show: of `data`, else those that the run was trained on."""
    if labelled is not None:
        return labelled_photographs(labelled)
    return training_photographs(run) if data is None else folder_photographs(Path(data))


def _labelled_again(results: list[dict[str, Any]]) -> LabelledSet | None:
    """The set that the scores are on, where it is still there."""
    data, root, split, void = (results[0].get(name) for name in ("data", "root", "split", "void"))
    if not data or split is None or void is None:  # the last two by a version that did not say
        return None
    try:
        return open_data(data, root, split, void) if _has_labels(data) else None
    except UsageError:
        return None


def _about(runs: list[Run]) -> dict[str, Any]:
    curves = charts([one.log for one in runs])
    return {
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "runs": [{"name": one.name, "lead": lead(one), "facts": facts(one), "notes": notes(one)} for one in runs],
        "kind": kind_of(runs[0]),
        "settings": [changed_settings(one.config) for one in runs],
        "charts": curves,
        "curves_data": [
            [{"steps": line.steps, "values": line.values, "places": line.places} for line in chart.lines]
            for chart in curves
        ],
    }


def _scored(runs: list[Run], results: list[dict[str, Any]]) -> dict[str, Any]:
    held = [one for one in results if one]
    if not held or not results[0]:
        return {"scores": None}
    facts = {name: results[0].get(name) for name in ("images", "pixels", "protocol")}
    return {
        "scores": {
            **facts,
            "data": Path(str(results[0]["data"])).name,
            "methods": [(run.name, methods(one)) for run, one in zip(runs, results) if one],
            "bars": bars(held),
            "matrices": [(number, found) for number, found in enumerate(map(matrix, held)) if found],
            "other_data": len(runs) > len(held),
        }
    }


def _seen(
    runs: list[Run], segmenters: list[Segmenter], photographs: Photographs | None, n: int, ends: list[float]
) -> dict[str, Any]:
    """Photographs and clusters; neither for a run without a model, or whose photographs are gone."""
    if not segmenters or photographs is None:
        return {"photographs": [], "galleries": [], "missing": "model" if not segmenters else "pictures"}
    shown, kept = {}, [Kept(run, segmenter) for run, segmenter in zip(runs, segmenters)]
    found = [Seen(segmenter.config.classes) for segmenter in segmenters]
    for path, picture in photographs.spread(n):
        codes = [codes_of(segmenter, picture) for segmenter in segmenters]
        most = PICTURE_BYTES // 2 // n
        shown[path] = draw(photographs.name(path), picture, list(zip(segmenters, codes, strict=True)), most)
        for segmenter, seen, own, of_run in zip(segmenters, found, kept, codes):
            if not own.photographs:
                seen.add(path, likeness(segmenter, of_run).cpu())
        if time.monotonic() > ends[0]:
            break
    galleries = []
    for run, segmenter, seen, own in zip(runs, segmenters, found, kept):
        pictures = photographs
        if own.photographs:
            look(segmenter, seen, own.codes(), ends[1])
            pictures = training_photographs(run) or photographs
        else:
            others = ((path, picture) for path, picture in photographs.spread(LOOKED_AT) if path not in shown)
            look(segmenter, seen, ((path, codes_of(segmenter, picture)) for path, picture in others), ends[1])
        most = PICTURE_BYTES // 4 // len(segmenters) // seen.clusters
        galleries.append({"clusters": gallery(segmenter, seen, pictures, most), "looked_at": seen.photographs})
    return {"photographs": [shown[path] for path in sorted(shown)], "galleries": galleries, "missing": None}


def _judged(
    results: list[dict[str, Any]], labelled: LabelledSet | None, segmenters: list[Segmenter], end: float
) -> dict[str, Any]:
    if not results[0] or labelled is None or not segmenters:
        return {"best": [], "worst": []}
    best, worst = judged(results[0], labelled, segmenters[0], JUDGED, PICTURE_BYTES // 4 // (2 * JUDGED), end)
    return {"best": best, "worst": worst}
