"""Label maps: from similarities to the number of every pixel, and what the numbers of a run stand for."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hpseg.data.datasets import NAMES
from hpseg.inference.pictures import palette
from hpseg.run.errors import UsageError
from hpseg.run.files import write_json

LABEL_FLOATS = 1 << 24  # of maps brought to full size at once
NO_CLASS = 255  # in a map of class ids: a cluster that no class was matched to


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


@dataclass(frozen=True)
class Matching:
    """Which class each cluster of a run was matched to, on which data set: RUN/labels.json, written by `hpseg eval`."""

    data: str
    class_of: dict[int, int]  # cluster -> class id; clusters without a class are left out
    names: dict[int, str]  # class id -> name

    @staticmethod
    def save(run: Path, results: dict) -> None:
        """Writes RUN/labels.json from the results of an evaluation: class name, id and IoU in percent per cluster."""
        scores = results["trained"]
        matched = {
            cluster: {"cluster": cluster, "id": number, "class": name, "iou": None if math.isnan(iou) else iou}
            for cluster, number, name, iou in zip(
                scores["cluster_of"], results["class_ids"], results["classes"], scores["iou"], strict=True
            )
        }
        free = {"id": None, "class": None, "iou": None}
        clusters = [matched.get(cluster, {"cluster": cluster, **free}) for cluster in range(results["clusters"])]
        facts = {name: results[name] for name in ("data", "protocol", "images")}
        write_json(run / "labels.json", {**facts, "clusters": clusters})

    @staticmethod
    def load(run: Path) -> Matching | None:
        """None where the run was never scored."""
        path = run / "labels.json"
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = [entry for entry in content["clusters"] if entry["id"] is not None]
            return Matching(
                content["data"],
                {int(entry["cluster"]): int(entry["id"]) for entry in found},
                {int(entry["id"]): str(entry["class"]) for entry in found},
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"run: {path} is not what `hpseg eval` writes ({type(error).__name__}: {error}); remove it"
            ) from None

    def classes(self, labels: np.ndarray) -> np.ndarray:
        """Class ids of a map of clusters, uint8; NO_CLASS where the cluster has none."""
        table = np.full(256, NO_CLASS, np.uint8)
        for cluster, number in self.class_of.items():
            table[cluster] = number
        return table[labels]


@dataclass(frozen=True)
class Key:
    """What the numbers in a label map stand for: a name each, and 256 colours, flat."""

    names: dict[int, str]
    colours: list[int]

    def of(self, labels: np.ndarray) -> dict[int, str]:
        """The names of the numbers that occur."""
        return {int(value): self.names[int(value)] for value in np.unique(labels)}

    @staticmethod
    def make(clusters: int, matching: Matching | None, as_classes: bool = False) -> Key:
        """For maps of clusters, or of class ids; a data set's own colours where it has some."""
        own, of_class = {}, matching.names if matching else {}
        if matching is not None and matching.data in NAMES:
            module = importlib.import_module(f"hpseg.data.sets.{NAMES[matching.data]}")
            own = dict(enumerate(getattr(module, "COLOURS", ())))
        if as_classes:
            colours, names = own, {**of_class, NO_CLASS: "no class"}
        else:
            class_of = matching.class_of if matching else {}
            colours = {cluster: own[number] for cluster, number in class_of.items() if number in own}
            names = {
                cluster: of_class[class_of[cluster]] if cluster in class_of else f"cluster {cluster}"
                for cluster in range(clusters)
            }
        flat = palette()
        for value, colour in colours.items():
            flat[3 * value : 3 * value + 3] = colour
        return Key(names, flat)
