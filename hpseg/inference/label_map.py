"""Label maps: from similarities to the number of every pixel, and what the numbers of a run stand for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from hpseg.data.datasets import LabelledSet
from hpseg.inference.palette import RGB, as_rgb, palette, spread
from hpseg.run.errors import UsageError
from hpseg.run.files import write_json

LABEL_FLOATS = 1 << 24  # of maps brought to full size at once
NO_CLASS = 255  # in a map of class ids: a cluster that no class was matched to; in one of the truth: void
LEAST_SHARE = 0.01  # of the pixels: what covers less is not in a legend


class LabelMap:
    """argmax over K of maps of `rows` rows, brought to `size` (H, W) bilinearly, from bands of rows, top to bottom.

    `labels` (H, W) uint8 are whole once all rows are in. The argmax does not see the length of a pixel's code, so K
    maps are resized instead of all channels of the code; a part of the rows at a time, so that a large photograph needs
    no K x H x W floats.
    """

    def __init__(self, rows: int, size: tuple[int, int]):
        self.labels = np.empty(size, np.uint8)
        # Where each row of the label map lies among those of the maps, as F.interpolate has it.
        self._position = ((torch.arange(size[0]) + 0.5) * (rows / size[0]) - 0.5).clamp(0, rows - 1)
        self._low = self._position.floor().long()
        self._high = (self._low + 1).clamp_max(rows - 1)
        self._seen, self._written = 0, 0
        self._kept: Tensor | None = None  # the last row seen: pixels lie between it and the next band

    def add(self, band: Tensor) -> None:
        """The next rows (1, K, r, w) of the maps."""
        maps = band.float() if self._kept is None else torch.cat([self._kept, band.float()], 2)
        first = self._seen - (self._kept is not None)
        self._seen += band.shape[2]
        self._kept = maps[:, :, -1:]
        width, ready = self.labels.shape[1], int((self._high < self._seen).sum())
        step = max(1, LABEL_FLOATS // (maps.shape[1] * width))
        for top in range(self._written, ready, step):
            lines = slice(top, min(top + step, ready))
            low, high = (self._low[lines] - first).to(maps.device), (self._high[lines] - first).to(maps.device)
            start, end = int(low[0]), int(high[-1]) + 1
            wide = F.interpolate(maps[:, :, start:end], (end - start, width), mode="bilinear", align_corners=False)[0]
            share = (self._position[lines] - self._low[lines]).to(maps.device).view(-1, 1)
            blended = wide[:, low - start].mul_(1 - share).add_(wide[:, high - start].mul_(share))
            self.labels[lines] = first_of_largest(blended).cpu().numpy()
        self._written = max(self._written, ready)


def first_of_largest(maps: Tensor) -> Tensor:
    """argmax over the K <= 256 maps (K, ...), the first of equals: uint8. On the CPU torch's own takes seven times as
    long, as it looks at the maps of one pixel after the other."""
    codes = torch.arange(255, 255 - len(maps), -1, device=maps.device).to(torch.uint8)
    largest = (maps == maps.amax(0)).to(torch.uint8).mul_(codes.view(-1, *[1] * (maps.ndim - 1))).amax(0)
    return (255 - largest).clamp_max_(len(maps) - 1)  # no map is the largest where there are NaN


def label_map(similarity: Tensor, size: tuple[int, int]) -> np.ndarray:
    """argmax over K of (1, K, h, w) similarities brought to `size` bilinearly: (H, W) uint8."""
    labels = LabelMap(similarity.shape[2], size)
    labels.add(similarity)
    return labels.labels


def agreement(maps: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """Pixels (256, 256) int64 by their numbers in label maps (H, W) uint8 of two kinds."""
    counts = np.zeros(1 << 16, np.int64)
    for one, other in zip(maps, others, strict=True):
        counts += np.bincount((one.astype(np.int64) * 256 + other).ravel(), minlength=1 << 16)
    return counts.reshape(256, 256)


@dataclass(frozen=True)
class Matching:
    """Which class each cluster of a run was matched to, on which data set: RUN/labels.json, written by `hpseg eval`."""

    data: str
    class_of: dict[int, int]  # cluster -> class id; clusters without a class are left out
    names: dict[int, str]  # class id -> name, of every class of the data set that occurs
    colours: dict[int, RGB] = field(default_factory=dict)  # class id -> its colour, where the data set has one

    @staticmethod
    def save(run: Path, results: dict) -> None:
        """Writes RUN/labels.json from the results of an evaluation."""
        write_json(run / "labels.json", Matching._described(results))

    @staticmethod
    def of(results: dict) -> Matching:
        """That of an evaluation, as `save` and `load` would have it."""
        return Matching._read(Matching._described(results))

    @staticmethod
    def _described(results: dict) -> dict:
        """The content of labels.json: class name, id and IoU in percent per cluster; name and colour per class."""
        scores, ids = results["trained"], results["class_ids"]
        matched = {
            cluster: {"cluster": cluster, "id": number, "class": name, "iou": None if math.isnan(iou) else iou}
            for cluster, number, name, iou in zip(
                scores["cluster_of"], ids, results["classes"], scores["iou"], strict=True
            )
        }
        free = {"id": None, "class": None, "iou": None}
        clusters = [matched.get(cluster, {"cluster": cluster, **free}) for cluster in range(results["clusters"])]
        classes = [
            {"id": number, "class": name, "colour": colour}
            for number, name, colour in zip(ids, results["classes"], results["colours"], strict=True)
        ]
        facts = {name: results[name] for name in ("data", "protocol", "images")}
        return {**facts, "clusters": clusters, "classes": classes}

    @staticmethod
    def load(run: Path) -> Matching | None:
        """None where the run was never scored."""
        path = run / "labels.json"
        if not path.is_file():
            return None
        try:
            return Matching._read(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"run: {path} is not what `hpseg eval` writes ({type(error).__name__}: {error}); remove it"
            ) from None

    @staticmethod
    def _read(content: dict) -> Matching:
        found = [entry for entry in content["clusters"] if entry["id"] is not None]
        classes = content.get("classes", found)  # older files name the classes that have a cluster, no others
        return Matching(
            content["data"],
            {int(entry["cluster"]): int(entry["id"]) for entry in found},
            {int(entry["id"]): str(entry["class"]) for entry in classes},
            {int(entry["id"]): as_rgb(entry["colour"]) for entry in classes if entry.get("colour")},
        )

    @staticmethod
    def fit(labelled: LabelledSet, maps: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> Matching:
        """The one-to-one match that agrees most on label maps (H, W) uint8 and what they should be, NO_CLASS for void:
        for pictures of a data set that the run was not scored on."""
        counts = agreement(maps, truths)
        counts[:, NO_CLASS] = 0
        numbers = {*np.flatnonzero(counts.any(0)).tolist(), *range(len(labelled.classes))}
        pairs = zip(*linear_sum_assignment(counts, maximize=True), strict=True)
        return Matching(
            labelled.name,
            {int(cluster): int(number) for cluster, number in pairs if counts[cluster, number]},
            {number: labelled.name_of(number) for number in sorted(numbers)},
            dict(enumerate(labelled.colours)),
        )

    def classes(self, labels: np.ndarray) -> np.ndarray:
        """Class ids of a map of clusters, uint8; NO_CLASS where the cluster has none."""
        table = np.full(256, NO_CLASS, np.uint8)
        for cluster, number in self.class_of.items():
            table[cluster] = number
        return table[labels]


@dataclass(frozen=True)
class Key:
    """What the numbers in a label map stand for: a name each, and 256 colours, flat.

    One class has one colour in all pictures: that of its data set, or else the palette's of its id. A cluster has the
    colour of the class that it was matched to; one without a class has a colour that no class has. Of clusters that
    share a class the first has its colour.
    """

    names: dict[int, str]
    colours: list[int]

    @staticmethod
    def make(clusters: int, matching: Matching | None, as_classes: bool = False) -> Key:
        """For maps of clusters, or of class ids."""
        if matching is None:
            return Key({cluster: f"cluster {cluster}" for cluster in range(clusters)}, palette())
        of_class = Key({**matching.names, NO_CLASS: "no class"}, _flat(matching.colours))
        if as_classes:
            return of_class
        first: dict[int, int] = {}
        for cluster, number in sorted(matching.class_of.items()):
            first.setdefault(number, cluster)
        colours = {cluster: of_class.colour(number) for number, cluster in first.items()}
        others = [cluster for cluster in range(clusters) if cluster not in colours]
        taken = {of_class.colour(number) for number in matching.names}
        colours |= zip(others, spread(sorted(taken), len(others)), strict=False)
        names = {
            cluster: of_class.names[matching.class_of[cluster]]
            if cluster in matching.class_of
            else f"cluster {cluster}"
            for cluster in range(clusters)
        }
        return Key(names, _flat(colours))

    def colour(self, value: int) -> RGB:
        return as_rgb(self.colours[3 * value : 3 * value + 3])

    @staticmethod
    def covering(*shown: tuple[Key, Sequence[np.ndarray]], least: float = LEAST_SHARE) -> Key:
        """For a legend of label maps and their keys: what covers at least this share of the maps of one key, the
        largest first, numbered 0, 1, ... Two keys' entries of the same name and colour are one. Never empty."""
        shares: Counter[tuple[str, RGB]] = Counter()
        for key, maps in shown:
            areas = np.sum([np.bincount(labels.ravel(), minlength=256) for labels in maps], axis=0)
            for value in np.flatnonzero(areas).tolist():
                entry = (key.names.get(value, str(value)), key.colour(value))
                shares[entry] = max(shares[entry], areas[value] / areas.sum())
        ordered = shares.most_common()
        entries = [entry for entry, share in ordered if share >= least] or [entry for entry, _ in ordered[:1]]
        names = {number: name for number, (name, _) in enumerate(entries)}
        return Key(names, _flat({number: colour for number, (_, colour) in enumerate(entries)}))


def _flat(colours: dict[int, RGB]) -> list[int]:
    """The palette with these colours in their places."""
    flat = palette()
    for number, colour in colours.items():
        flat[3 * number : 3 * number + 3] = colour
    return flat
