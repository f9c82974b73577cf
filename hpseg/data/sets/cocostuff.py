"""COCO-Stuff with its 27 coarse classes (12 things, 15 stuff), as in IIC, PiCIE, STEGO and Hidden Positives.

ROOT/images/{train2017,val2017}/<id>.jpg
ROOT/annotations/{train2017,val2017}/<id>.png   (or stuffthingmaps/): 0-181 as in stuffthingmaps, 255 unlabelled
ROOT/curated/{train2017,val2017}/*.txt          lists of ids; without them every image is taken
"""

from __future__ import annotations

import logging
from pathlib import Path

from hpseg.data.datasets import LabelledSet, class_table, read_list, require

logger = logging.getLogger(__name__)
CLASSES = (
    "electronic appliance food-thing furniture-thing indoor kitchen accessory animal outdoor person sports vehicle "
    "ceiling floor food-stuff furniture-stuff rawmaterial textile wall window building ground plant sky solid "
    "structural water"
).split()
FIRST_STUFF = 12
# fmt: off
FINE_TO_COARSE = [
    9, 11, 11, 11, 11, 11, 11, 11, 11, 8, 8, 8, 8, 8, 8, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 6, 6, 6, 6, 6, 6, 6, 6, 10, 10, 10, 10, 10, 10, 10,
    10, 10, 10, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2,
    2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 1, 1, 1,
    1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 4, 17, 17, 22, 20, 20, 22, 15, 25, 16,
    13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13, 13, 22, 26,
    14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21,
    17, 22, 16, 21, 21, 25, 21, 26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24,
    15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18, 18, 18, 26, 26, 19,
    19, 24,
]
# fmt: on
LISTS = {"train": "Coco164kFull_Stuff_Coarse.txt", "val": "Coco164kFull_Stuff_Coarse_7.txt"}


def open_split(root: Path, split: str) -> LabelledSet:
    images = require(root, "images", f"{split}2017", name="cocostuff")
    masks = next((name for name in ("annotations", "stuffthingmaps") if (root / name).is_dir()), "annotations")
    curated = [root / "curated" / folder / LISTS[split] for folder in (f"{split}2017", split)]
    listed = next((path for path in curated if path.is_file()), None)
    if listed is not None:
        ids = read_list(listed)
    else:
        ids = sorted(path.stem for path in images.glob("*.jpg"))
        logger.warning(f"cocostuff: no list {curated[0]}; all {len(ids)} images of the split are taken")
    labels = root / masks / f"{split}2017"
    pairs = [(images / f"{name}.jpg", labels / f"{name}.png") for name in ids]
    return LabelledSet("cocostuff", pairs, CLASSES, class_table(FINE_TO_COARSE), FIRST_STUFF)
