"""Cityscapes with 27 classes: label ids 7 to 33, in the layout of the published archives (and of torchvision).

    ROOT/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png
    ROOT/gtFine/{train,val}/<city>/*_gtFine_labelIds.png
"""

from __future__ import annotations

from pathlib import Path

from hpseg.config import UsageError
from hpseg.data.labelled import LabelledSet, class_table, require

CLASSES = [
    *("road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel"),
    *("pole", "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car"),
    *("truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
]
FIRST_ID = 7  # lower ids, and 255 (license plates are -1 on disk), are void
IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


def open_split(root: Path, split: str) -> LabelledSet:
    images = require(root, "leftImg8bit", split, name="cityscapes")
    found = sorted(images.glob(f"*/*{IMAGE}"))
    if not found:
        raise UsageError(f"root: cityscapes expects <city>/*{IMAGE} in {images}, found none")
    labels = root / "gtFine" / split
    pairs = [(image, labels / image.parent.name / (image.name.removesuffix(IMAGE) + LABEL)) for image in found]
    table = class_table({FIRST_ID + number: number for number in range(len(CLASSES))})
    return LabelledSet("cityscapes", pairs, CLASSES, table)
