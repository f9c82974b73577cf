"""`hpseg eval RUN DATA`: the trained head beside k-means on the very features it was trained on.

DATA is the name of a data set (`--root` says where it is) or a folder with `images/` and `labels/`, see
hpseg.data.labelled.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hpseg.checkpoints import write_json
from hpseg.clustering import spherical_kmeans
from hpseg.config import UsageError
from hpseg.data.folder import find_images
from hpseg.data.labelled import NAMES, LabelledSet, open_data, training_images
from hpseg.data.transforms import UnreadableImage, load_image
from hpseg.evaluation.metrics import confusion, score
from hpseg.evaluation.protocols import PROTOCOLS
from hpseg.predict import Segmenter, label_map, load

KMEANS_ROWS = 65_536

# What is known of a picture, by name: (1, rows, columns, C) each -> maps (1, K, rows, columns); the largest decides.
Segments = Callable[[dict[str, Tensor]], Tensor]


def kmeans_baseline(name: str, rows: Tensor, classes: int, seed: int) -> Segments:
    """The fixed recipe: spherical k-means over rows (N, C) of description `name`, 10 restarts, the best inertia."""
    centroids, _ = spherical_kmeans(rows, classes, restarts=10, seed=seed)
    return lambda described: (described[name] @ centroids.T).movedim(-1, 1)


class KMeans:
    """The baseline on its own, for pictures: fitted to prepared images (1, 3, H, W), then `predict`s label maps.

    describe: pixels -> (1, rows, columns, C).
    """

    def __init__(self, describe: Callable[[Tensor], Tensor], classes: int, pictures: list[Tensor], seed: int):
        each, rng, rows = math.ceil(KMEANS_ROWS / len(pictures)), torch.Generator().manual_seed(seed), []
        for pixels in pictures:
            tokens = describe(pixels).flatten(0, 2)
            rows.append(tokens[torch.randperm(len(tokens), generator=rng)[:each].to(tokens.device)])
        self.describe, self.segments = describe, kmeans_baseline("pixels", torch.cat(rows), classes, seed)

    def predict(self, pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
        return label_map(self.segments({"pixels": self.describe(pixels)}), size)


def codes_of(segmenter: Segmenter, described: dict[str, Tensor]) -> Tensor:
    """Codes (1, D, rows, columns); averaged with those of the mirror image where it was described, too."""

    def codes(features: Tensor) -> Tensor:
        return segmenter.head(features.flatten(1, 2)).transpose(1, 2).unflatten(2, features.shape[1:3])

    if "mirrored" not in described:
        return codes(described["features"])
    return (codes(described["features"]) + codes(described["mirrored"]).flip(3)) / 2


def trained(segmenter: Segmenter) -> Segments:
    return lambda described: segmenter.similarities(codes_of(segmenter, described))


def evaluate(run: str | Path, data: str | Path, **options) -> dict:
    """Scores of one run and its baselines on DATA; also written to RUN/eval.json. Options: see `evaluate_runs`."""
    results = evaluate_runs([run], data, **options)[0]
    write_json(Path(run) / "eval.json", results)
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
    seed: int = 0,
    device: str = "auto",
) -> list[dict]:
    """Scores of runs that share a backbone, a prediction size and training images, in one pass over DATA.

    protocol: see hpseg.evaluation.protocols. flip: average the codes of a picture and its mirror image; None does so
    where it was published: runs of STEGO under protocol "stego". crf: score the trained head after a dense CRF, too.

    The baselines are spherical k-means with as many clusters as the run has, fitted to patches of the photographs in
    `fit_on` (by default the runs' own training images: what the head saw, no more); k-means of run r is seeded with
    seed + r. `rgb` adds k-means on standardised colour means of patches.
    """
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
    if fit_on is None:
        fit_on = config.images
        files, read = training_images(config.images, config.root)
    else:
        files, read = find_images(fit_on), load_image

    def describe(pixels: Tensor, mirror: bool = False) -> dict[str, Tensor]:
        tokens = first.backbone(pixels)
        described = {"features": tokens.features.unflatten(1, tokens.grid)}
        if mirror:
            described["mirrored"] = first.backbone(pixels.flip(3)).features.unflatten(1, tokens.grid)
        if rgb:
            means = F.avg_pool2d(pixels.float() / 255, first.backbone.patch)
            described["rgb"] = ((means - first.backbone.mean) / first.backbone.std).movedim(1, -1)
        return described

    each, rng, rows = math.ceil(KMEANS_ROWS / len(files)), torch.Generator().manual_seed(seed), []
    for path in tqdm(files, desc="fit", unit="image", disable=None, leave=False):
        try:
            described = describe(first.prepare(read(path))[0])
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        picks = torch.randperm(described["features"][0, ..., 0].numel(), generator=rng)[:each]
        rows.append({name: maps.flatten(0, 2)[picks.to(maps.device)] for name, maps in described.items()})
    methods: list[dict[str, Segments]] = []
    for number, segmenter in enumerate(segmenters):
        methods.append({"trained": trained(segmenter)})
        for name in rows[0]:
            fitted = torch.cat([part[name] for part in rows])
            methods[-1][f"kmeans_{name}"] = kmeans_baseline(name, fitted, segmenter.config.classes, seed + number)

    counts = [
        {name: np.zeros((segmenter.config.classes, 256), np.int64) for name in [*of_run, *["trained_crf"] * crf]}
        for segmenter, of_run in zip(segmenters, methods, strict=True)
    ]
    scored = 0
    for image_path, label_path in tqdm(labelled.pairs, desc="eval", unit="image", disable=None, leave=False):
        try:
            picture = labelled.load_image(image_path)
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        truth = labelled.labels(label_path, picture.size)
        view = view_of(picture, truth, config.predict_size, first.backbone.patch)
        described = describe(first.pixels(view.shown), flip)
        for segmenter, of_run, totals in zip(segmenters, methods, counts, strict=True):
            for name, segments in of_run.items():
                labels = label_map(segments(described), view.truth.shape)
                totals[name] += confusion(labels, view.truth, len(totals[name]), 256)
            if crf:
                labels = label_map(segmenter.refined(view.picture, codes_of(segmenter, described)), view.truth.shape)
                totals["trained_crf"] += confusion(labels, view.truth, len(totals["trained_crf"]), 256)
        scored += 1
    facts = {"data": str(data), "protocol": protocol, "flip": flip, "fit_on": str(fit_on), "images": scored}
    return [report(totals, labelled, {**facts, "seed": seed + number}) for number, totals in enumerate(counts)]


def report(
    counts: dict[str, np.ndarray], labelled: LabelledSet, facts: dict, matched: dict[str, bool] | None = None
) -> dict:
    """Scores of every confusion matrix (clusters, 256): over the classes of a named data set, else those that occur.

    matched: whether a method's rows are clusters, to be matched to classes (default), or the classes themselves.
    """
    first = next(iter(counts.values()))
    occurring = np.flatnonzero(first.sum(0))
    if len(occurring) and labelled.name in NAMES:
        occurring = np.arange(len(labelled.classes))
    if not len(occurring):
        raise UsageError(f"data: no labelled pixel in {labelled.name}")
    names = labelled.classes + [str(number) for number in range(len(labelled.classes), int(occurring[-1]) + 1)]
    results = {
        **facts,
        "clusters": len(first),
        "pixels": int(first.sum()),
        "classes": [names[c] for c in occurring],
    }
    for name, matrix in counts.items():
        scores = score(matrix[:, occurring], None if (matched or {}).get(name, True) else occurring)
        results[name] = {
            "accuracy": scores.accuracy,
            "miou": scores.miou,
            "iou": scores.iou.tolist(),
            "cluster_of": scores.cluster_of.tolist(),
        }
        if labelled.first_stuff is not None:
            parts = {"things": range(labelled.first_stuff), "stuff": range(labelled.first_stuff, len(occurring))}
            for part, columns in parts.items():
                ious = scores.iou[list(columns)]
                results[name][f"miou_{part}"] = float(np.nanmean(ious)) if not np.isnan(ious).all() else float("nan")
    return results


TITLES = {
    "trained": "trained head",
    "trained_crf": "trained head + CRF",
    "kmeans_features": "k-means, frozen features",
    "kmeans_rgb": "k-means, RGB",
    "linear": "linear probe",
    "cluster": "cluster probe",
}


SCORES = {"accuracy": "accuracy", "mIoU": "miou", "mIoU, things": "miou_things", "mIoU, stuff": "miou_stuff"}


def format_table(results: dict) -> str:
    """Accuracy, mIoU and IoU per class in percent, one column per method."""
    methods = [name for name in TITLES if name in results]
    width = max(len(name) for name in [*results["classes"], *SCORES]) + 2
    lines = [
        f"{results['images']} images, {results['pixels']:,} labelled pixels, {results['clusters']} clusters matched to "
        f"{len(results['classes'])} classes; percent",
        " " * width + "".join(f"{TITLES[name]:>26}" for name in methods),
    ]
    lines += [
        f"{title:<{width}}" + "".join(f"{results[name][key]:>26.1f}" for name in methods)
        for title, key in SCORES.items()
        if key in results[methods[0]]
    ]
    lines += [
        f"{title:<{width}}" + "".join(f"{results[name]['iou'][row]:>26.1f}" for name in methods)
        for row, title in enumerate(results["classes"])
    ]
    return "\n".join(lines)
