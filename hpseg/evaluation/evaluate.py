"""`hpseg eval RUN DATA`: the trained head beside k-means on the very features it was trained on.

DATA is the name of a data set (`--root` says where it is) or a folder with `images/` and `labels/`, see
hpseg.data.datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpseg.data.datasets import NAMES, LabelledSet, open_data, training_images
from hpseg.data.folder import find_images
from hpseg.data.transforms import UnreadableImage, load_image, skip
from hpseg.evaluation.baselines import fit_baselines
from hpseg.evaluation.contenders import Segments, label_maps, linear_probe, trained
from hpseg.evaluation.metrics import Sparse, confusion, dense, score, sparse
from hpseg.evaluation.protocols import PROTOCOLS
from hpseg.features.kept import KeptTokens
from hpseg.inference.label_map import Matching
from hpseg.inference.segmenter import load
from hpseg.run.errors import UsageError
from hpseg.run.files import write_json
from hpseg.runtime.messages import Stopwatch, progress, waiting

TRAINED = ("trained", "trained_crf")  # what the run itself says


def evaluate(run: str | Path, data: str | Path, **options) -> dict:
    """Scores of one run and its baselines on DATA; also written to RUN/eval.json, and the classes its clusters were
    matched to to RUN/labels.json, for `hpseg predict`. Options: see `evaluate_runs`."""
    results = evaluate_runs([run], data, **options)[0]
    write_json(Path(run) / "eval.json", results)
    Matching.save(Path(run), results)
    return results


@torch.no_grad()
def evaluate_runs(
    runs: list[str | Path],
    data: str | Path,
    *,
    root: str | Path | None = None,
    split: str = "val",
    fit_on: str | Path | None = None,
    void: int = 255,
    rgb: bool = False,
    protocol: str = "default",
    flip: bool | None = None,
    crf: bool = False,
    linear: bool = False,
    baselines: bool = True,
    strict: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> list[dict]:
    """Scores of runs that share a backbone, a prediction size and training images, in one pass over DATA.

    protocol: see hpseg.evaluation.protocols. flip: average the codes of a picture and its mirror image; None does so
    where it was published: runs of STEGO under protocol "stego". crf: score the trained head after a dense CRF, too,
    and with it the linear probe. linear: score the linear probe in the run's folder, too, whose classes are not matched
    but known. strict: a picture that cannot be read is a UsageError; otherwise it is named, skipped, and "unreadable".

    The baselines are spherical k-means with as many clusters as the run has, fitted to patches of the photographs in
    `fit_on` (by default the runs' own training images: what the head saw, no more); k-means of run r is seeded with
    seed + r. `rgb` adds k-means on standardised colour means of patches. Without `baselines`
    they are left out, as for an imported run, which knows no training images, without `fit_on`.
    """
    watch = Stopwatch("loading")
    with waiting("loading"):
        labelled, segmenters = open_data(data, root, split, void), [load(run, device) for run in runs]
    first, config = segmenters[0], segmenters[0].config
    for other in segmenters[1:]:
        if other.backbone.fingerprint != first.backbone.fingerprint or other.config.predict_size != config.predict_size:
            raise UsageError(f"runs: {runs} differ in backbone or prediction size; evaluate them one by one")
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    view_of = PROTOCOLS[protocol]
    if flip is None:
        flip = protocol == "stego" and config.method == "stego"
    files: list[Path] = []
    read: Callable[[Path], Image.Image] = load_image
    if baselines and fit_on is not None:
        files = find_images(fit_on)
    elif baselines and config.images:
        fit_on = config.images
        files, read = training_images(config.images, config.root)
    kept = KeptTokens(first.backbone, config, Path(runs[0]))

    def describe(pixels: Tensor, photograph: Path, mirror: bool = False, keep: bool = True) -> dict[str, Tensor]:
        tokens = kept(pixels, photograph, keep)
        described = {name: getattr(tokens, name).unflatten(1, tokens.grid) for name in ("features", "colours")}
        if mirror:
            described["mirrored"] = kept(pixels.flip(3)).features.unflatten(1, tokens.grid)
        if rgb:
            scale = (first.backbone.mean.flatten(), first.backbone.std.flatten())
            described["rgb"] = (described["colours"] - scale[0]) / scale[1]
        return described

    watch.phase("baselines")
    methods: list[dict[str, Segments]] = [{"trained": trained(segmenter)} for segmenter in segmenters]
    if files:
        names = ["features", *["rgb"] * rgb]
        fitted = fit_baselines(runs, segmenters, files, read, partial(describe, keep=False), names, strict, seed)
        methods = [one | other for one, other in zip(methods, fitted, strict=True)]
    watch.phase("scoring")

    counts = [
        {name: np.zeros((segmenter.config.classes, 256), np.int64) for name in [*of_run, *["trained_crf"] * crf]}
        for segmenter, of_run in zip(segmenters, methods, strict=True)
    ]
    if linear:
        for run, segmenter, of_run, totals in zip(runs, segmenters, methods, counts, strict=True):
            of_run["linear"] = linear_probe(Path(run), segmenter, labelled)
            totals |= {name: np.zeros((256, 256), np.int64) for name in ["linear", *["linear_crf"] * crf]}
    scored: list[tuple[Path, Path]] = []
    by_picture: list[list[Sparse]] = [[] for _ in runs]  # of the trained head
    unreadable = []
    for image_path, label_path in progress(labelled.pairs, "eval", len(labelled.pairs)):
        try:
            picture = labelled.load_image(image_path)
        except UnreadableImage as error:
            skip(error, strict)
            unreadable.append(str(image_path))
            continue
        truth = labelled.labels(label_path, picture.size)
        view = view_of(picture, truth, config.predict_size, first.backbone.patch)
        of_view = partial(describe, photograph=image_path, mirror=flip)
        found = label_maps(segmenters, methods, of_view, view, crf)
        for (number, name), labels in found.items():
            of_picture = confusion(labels, view.truth, len(counts[number][name]), 256)
            counts[number][name] += of_picture
            if name == "trained":
                by_picture[number].append(sparse(of_picture))
        scored.append((image_path, label_path))
    facts = {"data": str(data), "protocol": protocol, "flip": flip, "fit_on": str(fit_on or ""), "images": len(scored)}
    facts |= {"root": str(root) if root is not None else None, "split": split, "void": void, "unreadable": unreadable}
    results = []
    for number, (totals, segmenter, matrices) in enumerate(zip(counts, segmenters, by_picture, strict=True)):
        known = {**facts, "backbone": segmenter.backbone.facts(), "labels_used": segmenter.config.labels_used}
        known["seed"] = seed + number
        matched = {"linear": False, "linear_crf": False, **dict.fromkeys(TRAINED, not segmenter.config.learns_classes)}
        results.append(report(totals, labelled, known, matched))
        results[-1] |= watch.results()
        results[-1]["pictures"] = scores_by_picture(scored, matrices, totals["trained"].shape, results[-1])
    return results


def scores_by_picture(
    pairs: list[tuple[Path, Path]], matrices: list[Sparse], shape: tuple[int, int], results: dict
) -> list[dict]:
    """Accuracy and mIoU in percent of the trained head on each picture, by the match over the whole set. Without a
    labelled pixel they are None. A class that a picture neither shows nor is given stays out of its mIoU."""
    class_ids, cluster_of = np.array(results["class_ids"]), np.array(results["trained"]["cluster_of"])
    pictures = []
    for (image, labels), matrix in zip(pairs, matrices, strict=True):
        counts = dense(matrix, shape)[:, class_ids]
        scores = score(counts, cluster_of) if counts.any() else None
        accuracy, miou = (scores.accuracy, scores.miou) if scores else (None, None)
        pictures.append({"image": str(image), "labels": str(labels), "accuracy": accuracy, "miou": miou})
    return pictures


def report(
    counts: dict[str, np.ndarray], labelled: LabelledSet, facts: dict, matched: dict[str, bool] | None = None
) -> dict:
    """Scores of every confusion matrix (clusters, 256): over the classes of a named data set, else those that occur.

    Each method's "confusion" holds its counts of pixels, a row per cluster, a column per entry of "class_ids". Where
    rows are classes, those beyond the last that was predicted are left out.
    matched: whether a method's rows are clusters, to be matched to classes (default), or the classes themselves.
    """
    first = next(iter(counts.values()))
    occurring = np.flatnonzero(first.sum(0))
    if len(occurring) and labelled.name in NAMES:
        occurring = np.arange(len(labelled.classes))
    if not len(occurring):
        raise UsageError(f"data: no labelled pixel in {labelled.name}")
    if not (matched or {}).get("trained", True) and occurring[-1] >= len(first):
        raise UsageError(f"data: {labelled.name} has class {occurring[-1]}, the run has classes 0 to {len(first) - 1}")
    results = {
        **facts,
        "clusters": len(first),
        "pixels": int(first.sum()),
        "classes": [labelled.name_of(c) for c in occurring.tolist()],
        "class_ids": occurring.tolist(),
        "colours": [labelled.colour_of(c) for c in occurring.tolist()],
    }
    for name, matrix in counts.items():
        scores = score(matrix[:, occurring], None if (matched or {}).get(name, True) else occurring)
        results[name] = {
            "accuracy": scores.accuracy,
            "miou": scores.miou,
            "iou": scores.iou.tolist(),
            "cluster_of": scores.cluster_of.tolist(),
            "confusion": _without_unused_rows(matrix[:, occurring], len(first)).tolist(),
        }
        if labelled.first_stuff is not None:
            parts = {"things": range(labelled.first_stuff), "stuff": range(labelled.first_stuff, len(occurring))}
            for part, columns in parts.items():
                ious = scores.iou[list(columns)]
                results[name][f"miou_{part}"] = float(np.nanmean(ious)) if not np.isnan(ious).all() else float("nan")
    return results


def _without_unused_rows(matrix: np.ndarray, least: int) -> np.ndarray:
    used = np.flatnonzero(matrix.any(1))
    return matrix[: max(least, used[-1] + 1 if len(used) else 0)]


TITLES = {
    "trained": "trained head",
    "trained_crf": "trained head + CRF",
    "kmeans_features": "k-means, frozen features",
    "kmeans_rgb": "k-means, RGB",
    "linear": "linear probe",
    "linear_crf": "linear probe + CRF",
    "cluster": "cluster probe",
}


SCORES = {"accuracy": "accuracy", "mIoU": "miou", "mIoU, things": "miou_things", "mIoU, stuff": "miou_stuff"}


def format_table(results: dict) -> str:
    """Accuracy, mIoU and IoU per class in percent, one column per method; mean ± sd where there are several runs."""
    methods = [name for name in TITLES if name in results]

    def cell(method: dict, key: str, row: int | None = None) -> str:
        values = [part[key] if row is None else part[key][row] for part in (method, method.get("sd")) if part]
        return f"{' ± '.join(f'{value:.1f}' for value in values):>26}"

    width = max(len(name) for name in [*results["classes"], *SCORES]) + 2
    lines = [
        f"{results['images']} images, {results['pixels']:,} labelled pixels, {results['clusters']} clusters, "
        f"{len(results['classes'])} classes; percent"
        + (f", mean ± sd of {len(results['runs'])} runs" if "runs" in results else ""),
        " " * width + "".join(f"{TITLES[name]:>26}" for name in methods),
    ]
    if results.get("labels_used"):
        lines.insert(0, results["labels_used"])
    lines += [
        f"{title:<{width}}" + "".join(cell(results[name], key) for name in methods)
        for title, key in SCORES.items()
        if key in results[methods[0]]
    ]
    lines += [
        f"{title:<{width}}" + "".join(cell(results[name], "iou", row) for name in methods)
        for row, title in enumerate(results["classes"])
    ]
    return "\n".join(lines)
