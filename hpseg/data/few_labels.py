"""Photographs of which some have labels: the list that names those, and views with their label maps.

Only the label files of listed pictures are ever opened. A list has one entry a line: an id (VOC, `2010_001195`), a
path (Cityscapes, `leftImg8bit/train/<city>/<stem>_leftImg8bit.png`), or an image and its label separated by a tab, of
which the image counts (`/images/train/<stem>.png<TAB>/segmentation/...`); or it is a share, "1/8".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hpseg.data.datasets import (
    NAMES,
    LabelledSet,
    open_folder,
    open_named,
    picture_folder,
)
from hpseg.data.folder import PhotoFolder, find_images, hash_seed
from hpseg.data.transforms import to_tensor
from hpseg.run.errors import UsageError

VOID, PADDING = -1, -2


def _stem(entry: str) -> str:
    return Path(entry.split("\t")[0].strip()).stem.removesuffix("_leftImg8bit")


def listed(data: LabelledSet, labeled: str, seed: int) -> list[tuple[Path, Path]]:
    """The (image, label) pairs of `data` that `labeled` names: a share such as "1/8", drawn by seed, or a list file."""
    if share := re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", labeled):
        part, whole = map(int, share.groups())
        if not 0 < part <= whole:
            raise UsageError(f"labeled: expected a share above 0 and at most 1, got {labeled!r}")
        count = max(1, round(len(data.pairs) * part / whole))
        order = torch.randperm(
            len(data.pairs),
            generator=torch.Generator().manual_seed(hash_seed("labeled", seed)),
        )
        return [data.pairs[i] for i in sorted(order[:count].tolist())]
    try:
        entries = [line for line in Path(labeled).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # not text, or no name of a file
        raise UsageError(f"labeled: expected a list of pictures or a share as 1/8, got {labeled!r} ({error})") from None
    if not entries:
        raise UsageError(f"labeled: {labeled} names no picture")
    by_stem: dict[str, list[tuple[Path, Path]]] = {}
    for pair in data.pairs:
        by_stem.setdefault(_stem(str(pair[0])), []).append(pair)
    chosen: dict[Path, Path] = {}
    for number, entry in enumerate(entries, 1):
        found = by_stem.get(_stem(entry), [])
        if len(found) > 1:  # the same name in several folders: the end of the path decides
            tail = Path(entry.split("\t")[0].strip()).with_suffix("").as_posix().lstrip("/")
            found = [pair for pair in found if f"/{pair[0].with_suffix('').as_posix()}".endswith(f"/{tail}")]
        if len(found) != 1:
            raise UsageError(
                f"labeled: line {number} of {labeled}, {entry!r}, fits {len(found)} of the {len(data.pairs)} labelled "
                f"pictures of {data.name}, expected one; for example {data.pairs[0][0]}"
            )
        chosen[found[0][0]] = found[0][1]
    return list(chosen.items())


class SemiViews(NamedTuple):
    """A batch: images (B, 3, S, S) uint8, labels (B, S, S) int64 with VOID and PADDING, unreadable files."""

    images: Tensor
    labels: Tensor
    unreadable: list[str]


Pairs = list[tuple[Path, Path]]  # (image, label)


def open_labelled(images: str, root: str | None, labeled: str, seed: int) -> tuple[LabelledSet, Pairs]:
    """The training set with labels, and the pairs of it that `labeled` names, whose labels exist."""
    data = open_named(images, root, "train") if images in NAMES else open_folder(Path(images))
    pairs = listed(data, labeled, seed)
    for _, label in pairs:
        if not label.is_file():
            raise UsageError(f"labeled: {label} does not exist")
    return data, pairs


def read_truth(data: LabelledSet, label: Path, size: tuple[int, int], classes: int) -> np.ndarray:
    """Classes (H, W) of a picture of `size` (width, height), VOID where none counts; all below `classes`."""
    truth = data.labels(label, size)
    if truth.max() >= classes:
        raise UsageError(f"classes: {label} has class {truth.max()}, expected numbers below {classes}")
    return truth


def random_view(image: Image.Image, labels: np.ndarray, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A picture and its label map (H, W) to pixels (3, S, S) uint8 and labels (S, S), S = size.

    The short side is brought to S and scaled by a factor (half the time in [0.5, 1], else in [1, 2]), mirrored half the
    time, and a random window is cut out; what lies outside of the picture is black and PADDING.
    """
    low, draw, mirror, across, down = torch.rand(5, generator=random, dtype=torch.float64).tolist()
    factor = 0.5 + draw / 2 if low < 0.5 else 1 + draw
    scale = factor * size / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    labels = F.interpolate(torch.from_numpy(labels)[None, None].double(), (height, width)).long()[0, 0]
    if mirror < 0.5:
        pixels, labels = pixels.flip(2), labels.flip(1)
    right, below = max(0, size - width), max(0, size - height)
    pixels, labels = F.pad(pixels, (0, right, 0, below)), F.pad(labels, (0, right, 0, below), value=PADDING)
    left = int(across * (labels.shape[1] - size + 1))
    top = int(down * (labels.shape[0] - size + 1))
    window = (slice(top, top + size), slice(left, left + size))
    return pixels[(slice(None), *window)].contiguous(), labels[window].contiguous()


def blank_view(path: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """What stands in for a picture that cannot be decoded: all padding, and its name."""
    return torch.zeros(3, size, size, dtype=torch.uint8), torch.full((size, size), PADDING), [str(path)]


def labelled_keys(batch: list[tuple[int, int]], images: int, labelled: int, seed: int) -> list[tuple[int, int]]:
    """For each (epoch, picture) of a batch of `images` pictures the key of a view with labels, pictures `images`, ...

    The list of the labelled pictures is repeated to the length of an epoch, and every entry is met at most once in it.
    """
    epoch, chosen = None, []
    for number, index in batch:
        if number != epoch:
            epoch = number
            generator = torch.Generator().manual_seed(hash_seed("labelled", seed, epoch))
            order = torch.randperm(-(-images // labelled) * labelled, generator=generator)
        chosen.append((number * images + index, images + int(order[index]) % labelled))
    return chosen


class SemiFolder(PhotoFolder):
    """Photographs without labels first, then those with; its length is the number of those without (an epoch).

    Views are those of `random_view`.
    """

    def __init__(
        self,
        images: str,
        root: str | None,
        labeled: str,
        classes: int,
        size: int,
        seed: int,
    ):
        data, pairs = open_labelled(images, root, labeled, seed)
        files = data.images if images in NAMES else find_images(picture_folder(Path(images)))
        with_labels = {image for image, _ in pairs}
        unlabelled = [path for path in files if path not in with_labels]
        if not unlabelled:
            raise UsageError(f"labeled: {labeled!r} names all {len(files)} pictures; expected some without labels")
        super().__init__(
            unlabelled + [image for image, _ in pairs],
            size,
            "random",
            seed,
            False,
            data.load_image,
        )
        self.data, self.classes, self.unlabelled = data, classes, len(unlabelled)
        self.label_files = [label for _, label in pairs]

    def __len__(self) -> int:
        return self.unlabelled

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, list[str]]:
        """A picture that cannot be decoded is all padding, and named."""
        epoch, index = key
        try:
            image = self.read(self.files[index])
        except OSError:
            return blank_view(self.files[index], self.size)
        truth = np.full((image.height, image.width), VOID, np.int64)
        if index >= self.unlabelled:
            truth = read_truth(self.data, self.label_files[index - self.unlabelled], image.size, self.classes)
        random = torch.Generator().manual_seed(hash_seed("view", self.seed, epoch, index))
        return *random_view(image, truth, self.size, random), []


def collate(items: list[tuple[Tensor, Tensor, list[str]]]) -> SemiViews:
    images, labels, unreadable = zip(*items, strict=True)
    return SemiViews(torch.stack(images), torch.stack(labels), [name for names in unreadable for name in names])
