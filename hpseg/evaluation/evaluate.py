"""`hpseg eval RUN DATA`: the trained head beside k-means on the very features it was trained on.

DATA holds `images/` and `labels/`, paired by stem. Labels are single-channel pictures of class ids; ids of `void` and
above the number of classes do not count. `classes.json` with {"classes": [names]} beside them names the classes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hpseg.clustering import spherical_kmeans
from hpseg.config import UsageError
from hpseg.data.folder import find_images
from hpseg.data.transforms import UnreadableImage, load_image
from hpseg.evaluation.metrics import Scores, confusion, match_and_score
from hpseg.predict import Segmenter, label_map, load

KMEANS_ROWS = 65_536


def find_pairs(data: str | Path) -> list[tuple[Path, Path]]:
    """(image, label) paths under DATA/images and DATA/labels with the same path below them up to the ending."""
    root = Path(data)
    for part in ("images", "labels"):
        if not (root / part).is_dir():
            held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) if root.is_dir() else "no such folder"
            raise UsageError(f"data: expected folders images/ and labels/ in {str(root)!r}, found: {held}")
    images, labels = ({path.relative_to(root / part).with_suffix(""): path for path in find_images(root / part)}
                      for part in ("images", "labels"))
    pairs = [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    if not pairs:
        raise UsageError(f"data: no image in {root / 'images'} has a label of the same name in {root / 'labels'}; "
                         f"for example {min(images)} and {min(labels)}")
    if len(pairs) < len(images):
        print(f"{len(images) - len(pairs)} of {len(images)} images have no label and are left out", file=sys.stderr)
    return pairs


def read_label(path: Path) -> np.ndarray:
    """Class ids (H, W) as they are stored, without turning palette indices into colours."""
    with Image.open(path) as picture:
        ids = np.asarray(picture)
    if ids.ndim != 2:
        raise UsageError(f"labels: {path} is a {picture.mode} picture, expected one channel of class ids (palette or gray)")
    return ids.astype(np.int64)


class KMeans:
    """A baseline: centroids (K, C) over what `describe` makes of a prepared image, (1, rows, columns, C)."""

    def __init__(self, describe, classes: int, pictures: list[Tensor], seed: int):
        self.describe = describe
        each = math.ceil(KMEANS_ROWS / len(pictures))
        rng = torch.Generator().manual_seed(seed)
        rows = []
        for pixels in pictures:
            tokens = describe(pixels).flatten(0, 2)
            rows.append(tokens[torch.randperm(len(tokens), generator=rng)[:each].to(tokens.device)])
        self.centroids, _ = spherical_kmeans(torch.cat(rows), classes, restarts=10, seed=seed)

    def predict(self, pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
        return label_map((self.describe(pixels) @ self.centroids.T).movedim(-1, 1), size)


def evaluate(run: str | Path, data: str | Path, *, fit_on: str | Path | None = None, void: int = 255, rgb: bool = False,
             seed: int = 0, device: str = "auto") -> dict:
    """Scores of the run and of its baselines on DATA; also written to RUN/eval.json.

    The baselines are spherical k-means with as many clusters as the run has, 10 restarts, the best inertia, fitted to
    patches of the photographs in `fit_on` (by default the run's own training images: what the head saw, no more). `rgb`
    adds k-means on standardised colour means of patches.
    """
    pairs, segmenter = find_pairs(data), load(run, device)
    config = segmenter.config
    fit_on = Path(fit_on or config.images)
    if not fit_on.is_dir():
        raise UsageError(f"fit_on: no folder {fit_on}; name the photographs that k-means is to be fitted to")

    def features(pixels: Tensor) -> Tensor:
        tokens = segmenter.backbone(pixels)
        return tokens.features.unflatten(1, tokens.grid)

    def colours(pixels: Tensor) -> Tensor:
        means = F.avg_pool2d(pixels.float() / 255, segmenter.backbone.patch)
        return ((means - segmenter.backbone.mean) / segmenter.backbone.std).movedim(1, -1)

    pictures = []
    for path in tqdm(find_images(fit_on), desc="fit", unit="image", disable=None, leave=False):
        try:
            pictures.append(segmenter.prepare(path)[0])
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
    with torch.no_grad():
        baselines = {"kmeans_features": KMeans(features, config.classes, pictures, seed)}
        if rgb:
            baselines["kmeans_rgb"] = KMeans(colours, config.classes, pictures, seed)
    del pictures

    counts = {name: np.zeros((config.classes, 256), np.int64) for name in ("trained", *baselines)}
    scored = 0
    for image_path, label_path in tqdm(pairs, desc="eval", unit="image", disable=None, leave=False):
        try:
            picture = load_image(image_path)
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        truth = read_label(label_path)
        if truth.shape != (picture.height, picture.width):
            raise UsageError(f"labels: {label_path} is {truth.shape[1]} x {truth.shape[0]} pixels, its image "
                             f"{picture.width} x {picture.height}")
        truth = np.where(truth == void, -1, truth)
        pixels, size = segmenter.prepare(picture)
        counts["trained"] += confusion(segmenter.predict(picture), truth, config.classes, 256)
        with torch.no_grad():
            for name, baseline in baselines.items():
                counts[name] += confusion(baseline.predict(pixels, size), truth, config.classes, 256)
        scored += 1

    occurring = np.flatnonzero(counts["trained"].sum(0))
    if not len(occurring):
        raise UsageError(f"data: no labelled pixel in {data} (void is {void})")
    names = class_names(Path(data), int(occurring[-1]) + 1)
    results = {"data": str(data), "fit_on": str(fit_on), "images": scored, "clusters": config.classes,
               "classes": [names[c] for c in occurring], "pixels": int(counts["trained"].sum()), "seed": seed}
    for name, matrix in counts.items():
        scores = match_and_score(matrix[:, occurring])
        results[name] = {"accuracy": scores.accuracy, "miou": scores.miou, "iou": scores.iou.tolist(),
                         "cluster_of": scores.cluster_of.tolist()}
    (Path(run) / "eval.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def class_names(data: Path, at_least: int) -> list[str]:
    """Names from DATA/classes.json, numbers for the rest."""
    names: list[str] = []
    if (data / "classes.json").is_file():
        content = json.loads((data / "classes.json").read_text())
        names = [str(name) for name in (content.get("classes", []) if isinstance(content, dict) else content)]
    return names + [str(number) for number in range(len(names), at_least)]


TITLES = {"trained": "trained head", "kmeans_features": "k-means, frozen features", "kmeans_rgb": "k-means, RGB"}


def format_table(results: dict) -> str:
    """Accuracy, mIoU and IoU per class in percent, one column per method."""
    methods = [name for name in TITLES if name in results]
    width = max(len(name) for name in [*results["classes"], "accuracy"]) + 2
    lines = [f"{results['images']} images, {results['pixels']:,} labelled pixels, {results['clusters']} clusters matched to "
             f"{len(results['classes'])} classes; percent",
             " " * width + "".join(f"{TITLES[name]:>26}" for name in methods)]
    lines += [f"{title:<{width}}" + "".join(f"{results[name][key]:>26.1f}" for name in methods)
              for title, key in (("accuracy", "accuracy"), ("mIoU", "miou"))]
    lines += [f"{title:<{width}}" + "".join(f"{results[name]['iou'][row]:>26.1f}" for name in methods)
              for row, title in enumerate(results["classes"])]
    return "\n".join(lines)
