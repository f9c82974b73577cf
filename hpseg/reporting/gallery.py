"""What each cluster is: its most typical patches, and its share of the photographs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hpseg.inference.segmenter import Segmenter
from hpseg.reporting.images import Embedded, embedded
from hpseg.reporting.photographs import Photographs, css_colour

SIDE = 120  # pixels of a patch on the page
CONTEXT = 0.22  # side of what is cut out around a patch, as a share of the photograph's short side
PER_CLUSTER, PER_PAGE = 8, 320  # patches
PER_PHOTOGRAPH = 2  # candidates of one cluster from one photograph
APART = 5  # patches between two of them


@dataclass(frozen=True)
class Patch:
    """Where a typical patch lies, its middle in shares of the photograph's height and width."""

    likeness: float  # cosine with the centroid, or the score of the class
    path: Path
    y: float
    x: float


@dataclass(frozen=True)
class Cluster:
    name: str
    colour: str
    share: float
    patches: list[Embedded]


@dataclass
class Seen:
    """What was found so far, photograph by photograph."""

    clusters: int
    patches: np.ndarray = field(init=False)  # of each cluster
    typical: dict[int, list[Patch]] = field(init=False)
    photographs: int = 0

    def __post_init__(self) -> None:
        self.patches = np.zeros(self.clusters, np.int64)
        self.typical = {cluster: [] for cluster in range(self.clusters)}

    def add(self, path: Path, likeness: Tensor) -> None:
        """The next photograph. likeness (K, rows, columns): of every patch to every cluster; the largest decides."""
        found, rows, columns = likeness.argmax(0), *likeness.shape[1:]
        self.patches += np.bincount(found.flatten().cpu().numpy(), minlength=self.clusters)
        self.photographs += 1
        for cluster in found.unique().tolist():
            held = torch.where(found == cluster, likeness[cluster], -torch.inf)
            for _ in range(PER_PHOTOGRAPH):
                best = int(held.argmax())
                row, column = divmod(best, columns)
                value = float(held[row, column])
                if value == -float("inf"):
                    break
                self.typical[cluster].append(Patch(value, path, (row + 0.5) / rows, (column + 0.5) / columns))
                held[max(0, row - APART) : row + APART + 1, max(0, column - APART) : column + APART + 1] = -torch.inf

    def best(self, cluster: int, n: int) -> list[Patch]:
        """The `n` most typical patches, from as many photographs as there are before a second of any."""
        ranked = sorted(self.typical[cluster], key=lambda patch: -patch.likeness)
        first: dict[Path, Patch] = {}
        for patch in ranked:
            first.setdefault(patch.path, patch)
        again = [patch for patch in ranked if first[patch.path] is not patch]
        return [*first.values(), *again][:n]


@torch.no_grad()
def likeness(segmenter: Segmenter, codes: Tensor) -> Tensor:
    """(K, rows, columns) of codes (1, D, rows, columns)."""
    if segmenter.config.learns_classes:
        return segmenter.similarities(codes)[0].softmax(0)
    return segmenter.similarities(F.normalize(codes.float(), dim=1))[0]


def look(segmenter: Segmenter, seen: Seen, described: Iterable[tuple[Path, Tensor]], end: float) -> None:
    """Adds photographs to `seen`, each given with its codes (1, D, rows, columns), until there are no more or the time
    `end` of `time.monotonic` has passed."""
    for path, codes in described:
        seen.add(path, likeness(segmenter, codes).cpu())
        if time.monotonic() > end:
            return


def gallery(segmenter: Segmenter, seen: Seen, photographs: Photographs, most: int) -> list[Cluster]:
    """All clusters, largest first. most: bytes of a cluster's pictures."""
    key, each = segmenter.key(), max(1, min(PER_CLUSTER, PER_PAGE // seen.clusters))
    chosen = {cluster: seen.best(cluster, each) for cluster in range(seen.clusters)}
    cut: dict[Patch, Embedded] = {}
    for path in dict.fromkeys(patch.path for patches in chosen.values() for patch in patches):
        picture = photographs.read(path)  # each is read once, and was readable a moment ago
        for patch in (patch for patches in chosen.values() for patch in patches if patch.path == path):
            cut[patch] = embedded(crop(picture, patch), SIDE, most // each)
    shares = seen.patches / max(1, seen.patches.sum())
    return [
        Cluster(
            key.names.get(cluster, f"cluster {cluster}"),
            css_colour(key, cluster),
            float(shares[cluster]),
            [cut[patch] for patch in chosen[cluster]],
        )
        for cluster in np.argsort(-shares, kind="stable").tolist()
    ]


def crop(picture: Image.Image, patch: Patch) -> Image.Image:
    """A square around the patch, moved inside where it would reach out of the picture."""
    side = max(1, min(max(24, round(CONTEXT * min(picture.size))), *picture.size))
    left, top = (
        min(max(0, round(place * length - side / 2)), length - side)
        for place, length in zip((patch.x, patch.y), picture.size)
    )
    return picture.crop((left, top, left + side, top + side))
