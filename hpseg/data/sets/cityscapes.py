"""Cityscapes with 27 classes: label ids 7 to 33, in the layout of the published archives (and of torchvision).

ROOT/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png
ROOT/gtFine/{train,val}/<city>/*_gtFine_labelIds.png
"""

from __future__ import annotations

from pathlib import Path

from hpseg.data.datasets import LabelledSet, class_table, require
from hpseg.run.errors import UsageError

CLASSES = [
    *("road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel"),
    *("pole", "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car"),
    *("truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
]
COLOURS = [  # RGB, those of the data set's own tools
    *((128, 64, 128), (244, 35, 232), (250, 170, 160), (230, 150, 140), (70, 70, 70), (102, 102, 156)),
    *((190, 153, 153), (180, 165, 180), (150, 100, 100), (150, 120, 90), (153, 153, 153), (153, 153, 153)),
    *((250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0)),
    *((0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 0, 90), (0, 0, 110), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
]
FIRST_ID = 7  # lower ids, and 255 (license plates are -1 on disk), are void
IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


def open_split(root: Path, split: str) -> LabelledSet:
    return open_classes(
        "cityscapes", root, split, CLASSES, COLOURS, {FIRST_ID + number: number for number in range(len(CLASSES))}
    )


def open_classes(
    name: str, root: Path, split: str, classes: list[str], colours: list[tuple[int, int, int]], table: dict[int, int]
) -> LabelledSet:
    """The split as the data set `name`, with classes by a table of label ids; ids that it lacks are void."""
    images = require(root, "leftImg8bit", split, name=name)
    found = sorted(images.glob(f"*/*{IMAGE}"))
    if not found:
        raise UsageError(f"root: {name} expects <city>/*{IMAGE} in {images}, found none")
    labels = root / "gtFine" / split
    pairs = [(image, labels / image.parent.name / (image.name.removesuffix(IMAGE) + LABEL)) for image in found]
    return LabelledSet(name, pairs, classes, class_table(table), colours=colours)
