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
from hpseg.data.labelled import LabelledSet, open_data, training_images
from hpseg.data.transforms import UnreadableImage, load_image
from hpseg.evaluation.metrics import confusion, match_and_score
from hpseg.predict import Segmenter, label_map, load

KMEANS_ROWS = 65_536

# Descriptions (1, rows, columns, C) of a picture -> maps (1, K, rows, columns), of which the largest decides.
Segments = Callable[[Tensor], Tensor]


def kmeans_baseline(rows: Tensor, classes: int, seed: int) -> Segments:
    """The fixed recipe: spherical k-means over rows (N, C), 10 restarts, the best inertia."""
    centroids, _ = spherical_kmeans(rows, classes, restarts=10, seed=seed)
    return lambda described: (described @ centroids.T).movedim(-1, 1)


class KMeans:
    """The baseline on its own, for pictures: fitted to prepared images (1, 3, H, W), then `predict`s label maps.

    describe: pixels -> (1, rows, columns, C).
    """

    def __init__(self, describe: Callable[[Tensor], Tensor], classes: int, pictures: list[Tensor], seed: int):
        each, rng, rows = math.ceil(KMEANS_ROWS / len(pictures)), torch.Generator().manual_seed(seed), []
        for pixels in pictures:
            tokens = describe(pixels).flatten(0, 2)
            rows.append(tokens[torch.randperm(len(tokens), generator=rng)[:each].to(tokens.device)])
        self.describe, self.segments = describe, kmeans_baseline(torch.cat(rows), classes, seed)

    def predict(self, pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
        return label_map(self.segments(self.describe(pixels)), size)


def trained(segmenter: Segmenter) -> Segments:
    return lambda features: (
        segmenter.clusters(segmenter.head(features.flatten(1, 2))).transpose(1, 2).unflatten(2, features.shape[1:3])
    )


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
    seed: int = 0,
    device: str = "auto",
) -> list[dict]:
    """Scores of runs that share a backbone, a prediction size and training images, in one pass over DATA.

    The baselines are spherical k-means with as many clusters as the run has, fitted to patches of the photographs in
    `fit_on` (by default the runs' own training images: what the head saw, no more); k-means of run r is seeded with
    seed + r. `rgb` adds k-means on standardised colour means of patches.
    """
    labelled, segmenters = open_data(data, root, split, void), [load(run, device) for run in runs]
    first, config = segmenters[0], segmenters[0].config
    for other in segmenters[1:]:
        if other.backbone.fingerprint != first.backbone.fingerprint or other.config.predict_size != config.predict_size:
            raise UsageError(f"runs: {runs} differ in backbone or prediction size; evaluate them one by one")
    if fit_on is None:
        fit_on = config.images
        files, read = training_images(config.images, config.root)
    else:
        files, read = find_images(fit_on), load_image

    def describe(pixels: Tensor) -> dict[str, Tensor]:
        tokens = first.backbone(pixels)
        described = {"features": tokens.features.unflatten(1, tokens.grid)}
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
    methods: list[dict[str, tuple[str, Segments]]] = []
    for number, segmenter in enumerate(segmenters):
        methods.append({"trained": ("features", trained(segmenter))})
        for name in rows[0]:
            baseline = kmeans_baseline(
                torch.cat([part[name] for part in rows]), segmenter.config.classes, seed + number
            )
            methods[-1][f"kmeans_{name}"] = (name, baseline)

    counts = [
        {name: np.zeros((segmenter.config.classes, 256), np.int64) for name in of_run}
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
        pixels, size = first.prepare(picture)
        described = describe(pixels)
        for of_run, totals in zip(methods, counts, strict=True):
            for name, (source, segments) in of_run.items():
                totals[name] += confusion(label_map(segments(described[source]), size), truth, len(totals[name]), 256)
        scored += 1
    return [
        _report(totals, labelled, {"data": str(data), "fit_on": str(fit_on), "images": scored, "seed": seed + number})
        for number, totals in enumerate(counts)
    ]


def _report(counts: dict[str, np.ndarray], labelled: LabelledSet, facts: dict) -> dict:
    """Scores of every confusion matrix (clusters, 256) over the classes that occur."""
    occurring = np.flatnonzero(counts["trained"].sum(0))
    if not len(occurring):
        raise UsageError(f"data: no labelled pixel in {labelled.name}")
    names = labelled.classes + [str(number) for number in range(len(labelled.classes), int(occurring[-1]) + 1)]
    results = {
        **facts,
        "clusters": len(counts["trained"]),
        "pixels": int(counts["trained"].sum()),
        "classes": [names[c] for c in occurring],
    }
    for name, matrix in counts.items():
        scores = match_and_score(matrix[:, occurring])
        results[name] = {
            "accuracy": scores.accuracy,
            "miou": scores.miou,
            "iou": scores.iou.tolist(),
            "cluster_of": scores.cluster_of.tolist(),
        }
    return results


TITLES = {"trained": "trained head", "kmeans_features": "k-means, frozen features", "kmeans_rgb": "k-means, RGB"}


def format_table(results: dict) -> str:
    """Accuracy, mIoU and IoU per class in percent, one column per method."""
    methods = [name for name in TITLES if name in results]
    width = max(len(name) for name in [*results["classes"], "accuracy"]) + 2
    lines = [
        f"{results['images']} images, {results['pixels']:,} labelled pixels, {results['clusters']} clusters matched to "
        f"{len(results['classes'])} classes; percent",
        " " * width + "".join(f"{TITLES[name]:>26}" for name in methods),
    ]
    lines += [
        f"{title:<{width}}" + "".join(f"{results[name][key]:>26.1f}" for name in methods)
        for title, key in (("accuracy", "accuracy"), ("mIoU", "miou"))
    ]
    lines += [
        f"{title:<{width}}" + "".join(f"{results[name]['iou'][row]:>26.1f}" for name in methods)
        for row, title in enumerate(results["classes"])
    ]
    return "\n".join(lines)
