"""What gives every patch of a picture a cluster or a class: the trained head, k-means, a linear probe."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hpseg.data.datasets import LabelledSet
from hpseg.evaluation.protocols import View
from hpseg.inference.label_map import LabelMap, label_map
from hpseg.inference.segmenter import Segmenter, refined_scores
from hpseg.models.backbone import Tokens
from hpseg.models.heads import fit_centroids
from hpseg.run.errors import UsageError
from hpseg.run.folder import load_tensors

KMEANS_ROWS = 65_536

# What is known of a picture, by name: (1, rows, columns, C) each -> maps (1, K, rows, columns); the largest decides.
Segments = Callable[[dict[str, Tensor]], Tensor]


def kmeans_segments(name: str, centroids: Tensor) -> Segments:
    """By centroids (K, C) of description `name`, unit rows."""
    return lambda described: (described[name] @ centroids.to(described[name]).T).movedim(-1, 1)


class KMeans:
    """The baseline on its own, for pictures: fitted to prepared images (1, 3, H, W), then `predict`s label maps.

    describe: pixels -> (1, rows, columns, C).
    """

    def __init__(self, describe: Callable[[Tensor], Tensor], classes: int, pictures: list[Tensor], seed: int):
        each, rng, rows = math.ceil(KMEANS_ROWS / len(pictures)), torch.Generator().manual_seed(seed), []
        for pixels in pictures:
            tokens = describe(pixels).flatten(0, 2)
            rows.append(tokens[torch.randperm(len(tokens), generator=rng)[:each].to(tokens.device)])
        self.describe = describe
        self.segments = kmeans_segments("pixels", fit_centroids(torch.cat(rows), classes, seed))

    def predict(self, pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
        return label_map(self.segments({"pixels": self.describe(pixels)}), size)


def codes_of(segmenter: Segmenter, described: dict[str, Tensor]) -> Tensor:
    """Codes (1, D, rows, columns); averaged with those of the mirror image where it was described, too."""

    def codes(features: Tensor, colours: Tensor) -> Tensor:
        grid = tuple(features.shape[1:3])
        tokens = Tokens(features.flatten(1, 2), None, grid, colours.flatten(1, 2))
        return segmenter.head.codes_of(tokens).transpose(1, 2).unflatten(2, grid)

    features, colours = described["features"], described["colours"]
    if "mirrored" not in described:
        return codes(features, colours)
    return (codes(features, colours) + codes(described["mirrored"], colours.flip(2)).flip(3)) / 2


def trained(segmenter: Segmenter) -> Segments:
    return lambda described: segmenter.similarities(described["codes"])


def linear_probe(run: Path, segmenter: Segmenter, labelled: LabelledSet) -> Segments:
    """Class scores by the linear probe kept in RUN/probe.safetensors, fitted by `hpseg probe` or imported."""
    path = run / "probe.safetensors"
    if not path.is_file():
        raise UsageError(f"linear: {run} holds no probe.safetensors; run `hpseg probe {run} DATA` first")
    found = {name: value.to(segmenter.clusters.centroids) for name, value in load_tensors(path)[0].items()}
    weight, bias = found["linear.weight"], found["linear.bias"]
    if labelled.classes and len(bias) != len(labelled.classes):
        raise UsageError(
            f"linear: the probe in {run} tells {len(bias)} classes apart, {labelled.name} has {len(labelled.classes)}"
        )
    return lambda described: F.linear(described["codes"].movedim(1, -1), weight, bias).movedim(-1, 1)


def label_maps(
    segmenters: list[Segmenter],
    methods: list[dict[str, Segments]],
    describe: Callable[[Tensor], dict[str, Tensor]],
    view: View,
    crf: bool,
) -> dict[tuple[int, str], np.ndarray]:
    """Clusters (H, W) uint8 of a view by run number and method; with `crf` also "trained_crf" of every run, and
    "linear_crf" of those with a linear probe."""

    def maps(part: Tensor) -> dict[tuple[int, str], Tensor]:
        described = describe(part)
        made = {}
        for number, (segmenter, of_run) in enumerate(zip(segmenters, methods, strict=True)):
            made[number, "codes"] = codes_of(segmenter, described)
            seen = {**described, "codes": made[number, "codes"]}
            made |= {(number, name): segments(seen) for name, segments in of_run.items()}
        return made

    first = segmenters[0]
    pixels = first.pixels(view.shown)
    rows = pixels.shape[2] // first.backbone.patch
    found = {(number, name): LabelMap(rows, view.truth.shape) for number, m in enumerate(methods) for name in m}
    codes: dict[int, list[Tensor]] = {number: [] for number in range(len(segmenters) * crf)}
    scores: dict[int, list[Tensor]] = {number: [] for number in codes if "linear" in methods[number]}
    for band in first.bands(pixels, maps, view.window):
        for key, outcome in found.items():
            outcome.add(band[key])
        for number, parts in codes.items():
            parts.append(band[number, "codes"])
        for number, parts in scores.items():
            parts.append(band[number, "linear"])
    labels = {key: outcome.labels for key, outcome in found.items()}
    for number, parts in codes.items():
        refined = segmenters[number].refined(view.picture, torch.cat(parts, 2))
        labels[number, "trained_crf"] = label_map(refined, view.truth.shape)
    for number, parts in scores.items():
        refined = refined_scores(view.picture, torch.cat(parts, 2))
        labels[number, "linear_crf"] = label_map(refined, view.truth.shape)
    return labels
