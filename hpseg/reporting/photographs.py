"""Photographs for a page: which are shown, and what each looks like as a picture, as clusters and with an overlay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpseg.data.datasets import NAMES, LabelledSet, picture_folder, training_images
from hpseg.data.folder import find_images
from hpseg.data.transforms import UnreadableImage, load_image
from hpseg.inference.label_map import LEAST_SHARE, NO_CLASS, Key, label_map
from hpseg.inference.pictures import label_image, overlay
from hpseg.inference.segmenter import Segmenter
from hpseg.reporting.about import Run
from hpseg.reporting.images import Embedded, embedded, fitted
from hpseg.run.errors import UsageError

SIDE = 720  # pixels of the long side of a photograph
JUDGED_SIDE = 480  # the same of one beside its labels


def scattered(count: int) -> list[int]:
    """0 to count - 1, in an order that comes near every number however soon it is left: by the golden ratio."""
    return sorted(range(count), key=lambda number: number * 0.6180339887 % 1)


@dataclass(frozen=True)
class Photographs:
    """Files, what reads one of them, and the folder that their names are given below."""

    files: list[Path]
    read: Callable[[Path], Image.Image]
    folder: Path | None = None

    def name(self, path: Path) -> str:
        if self.folder is not None and path.is_relative_to(self.folder):
            return path.relative_to(self.folder).as_posix()
        return path.name

    def spread(self, n: int) -> Iterator[tuple[Path, Image.Image]]:
        """At most `n` of those that can be read, spread evenly over the files; so are those before the last."""
        first = [self.files[number * len(self.files) // n] for number in scattered(n)] if self.files else []
        made = 0
        for path in dict.fromkeys([*first, *self.files]):
            if made == min(n, len(self.files)):
                return
            try:
                picture = self.read(path)
            except UnreadableImage:
                continue
            made += 1
            yield path, picture


def training_photographs(run: Run) -> Photographs | None:
    """Those that the run was trained on; None where it knows of none, or they are not there any more."""
    images, root = run.config.images, run.config.root
    if not images:
        return None
    try:
        files, read = training_images(images, root)
    except (UsageError, OSError):
        return None
    return Photographs(files, read, None if images in NAMES else picture_folder(Path(images)))


def labelled_photographs(labelled: LabelledSet) -> Photographs:
    return Photographs(labelled.images, labelled.load_image)


def folder_photographs(folder: Path) -> Photographs:
    """UsageError for a folder without pictures."""
    return Photographs(find_images(folder), load_image, folder)


@dataclass(frozen=True)
class Entry:
    """What a colour in a picture stands for, and its share of the picture."""

    name: str
    colour: str
    share: float


@dataclass(frozen=True)
class Layers:
    """A photograph as one run sees it."""

    clusters: Embedded
    overlay: Embedded
    legend: list[Entry]


@dataclass(frozen=True)
class Shown:
    name: str
    picture: Embedded
    runs: list[Layers]

    @property
    def ratio(self) -> float:
        return self.picture.width / self.picture.height


def css_colour(key: Key, value: int) -> str:
    """The colour of a number of a label map."""
    return "#{:02x}{:02x}{:02x}".format(*key.colour(value))


@torch.no_grad()
def codes_of(segmenter: Segmenter, picture: Image.Image) -> Tensor:
    """(1, D, rows, columns), as `Segmenter.predict` decides by."""
    return segmenter.codes(segmenter.prepare(picture)[0])


def labels_of(segmenter: Segmenter, codes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The clusters (H, W) uint8 that `Segmenter.predict` finds by these codes, at another `size` (W, H)."""
    return label_map(segmenter.similarities(codes), (size[1], size[0]))


def legend_of(labels: np.ndarray, key: Key) -> list[Entry]:
    """What covers LEAST_SHARE of a label map or more, largest first."""
    shares = np.bincount(labels.reshape(-1), minlength=256) / labels.size
    order = [int(value) for value in np.argsort(-shares, kind="stable") if shares[value] >= LEAST_SHARE]
    return [Entry(key.names.get(value, str(value)), css_colour(key, value), float(shares[value])) for value in order]


def draw(name: str, picture: Image.Image, seen: Sequence[tuple[Segmenter, Tensor]], most: int) -> Shown:
    """A photograph as runs see it. seen: each run with its codes of the picture. most: bytes that it may take."""
    small, layers = _small(picture, SIDE), []
    each = most // (2 + 3 * len(seen))  # a label map takes least
    for segmenter, codes in seen:
        labels, key = labels_of(segmenter, codes, small.size), segmenter.key()
        clusters = embedded(label_image(labels, key.colours), SIDE, each)
        overlaid = embedded(overlay(small, labels, colours=key.colours), SIDE, 2 * each)
        layers.append(Layers(clusters, overlaid, legend_of(labels, key)))
    return Shown(name, embedded(small, SIDE, 2 * each), layers)


def _small(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize(fitted(picture.size, side), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Judged:
    """A picture with its labels beside what the run says, in the colours of the classes."""

    name: str
    accuracy: float
    miou: float | None
    picture: Embedded
    truth: Embedded
    found: Embedded
    legend: list[Entry]


def judged(
    results: dict[str, Any], labelled: LabelledSet, segmenter: Segmenter, n: int, most: int, end: float
) -> tuple[list[Judged], list[Judged]]:
    """The `n` best and the `n` worst pictures of an evaluation by their accuracy, none in both; fewer where files are
    not there any more, or the time `end` of `time.monotonic` has passed. most: bytes that one of them may take."""
    entries = [entry for entry in results.get("pictures", ()) if entry["accuracy"] is not None]
    ranked = sorted(entries, key=lambda entry: (entry["accuracy"], entry["miou"] or 0))
    half = min(n, len(ranked) // 2)
    best: list[Judged] = []
    worst: list[Judged] = []
    for good, bad in zip(ranked[: -half - 1 : -1], ranked[:half]):
        for entry, found in ((good, best), (bad, worst)):
            shown = _judged(entry, results, labelled, segmenter, most)
            found += [shown] if shown else []
        if time.monotonic() > end:
            break
    return best, worst


def _judged(
    entry: dict[str, Any], results: dict[str, Any], labelled: LabelledSet, segmenter: Segmenter, most: int
) -> Judged | None:
    if segmenter.matching is None:
        return None
    try:
        picture = labelled.load_image(Path(entry["image"]))
        truth = labelled.labels(Path(entry["labels"]), picture.size)
    except (UnreadableImage, UsageError):
        return None
    small, key = _small(picture, JUDGED_SIDE), segmenter.key(as_classes=True)
    key = Key({**dict(zip(results["class_ids"], results["classes"], strict=True)), **key.names}, key.colours)
    ids = Image.fromarray(np.where(truth < 0, NO_CLASS, truth).astype(np.uint8))
    labels = np.asarray(ids.resize(small.size, Image.Resampling.NEAREST))
    found = segmenter.matching.classes(labels_of(segmenter, codes_of(segmenter, picture), small.size))
    return Judged(
        Path(entry["image"]).name,
        float(entry["accuracy"]),
        None if entry.get("miou") is None else float(entry["miou"]),
        embedded(small, JUDGED_SIDE, most // 2),
        embedded(label_image(labels, key.colours), JUDGED_SIDE, most // 4),
        embedded(label_image(found, key.colours), JUDGED_SIDE, most // 4),
        [part for part in legend_of(np.concatenate([labels, found]), key) if part.name != key.names[NO_CLASS]],
    )
