"""Potsdam-3 (IIC's tiles of the ISPRS Potsdam set): roads and cars, buildings and clutter, vegetation.

ROOT/{labelled_train,labelled_test}.txt    ids of the tiles
ROOT/imgs/<id>.mat                         key img, uint8 (H, W, 4): red, green, blue, infrared
ROOT/gt/<id>.mat                           key gt, (H, W)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hpseg.data.datasets import LabelledSet, class_table, read_list, require
from hpseg.data.transforms import UnreadableImage

CLASSES = ["roads and cars", "buildings and clutter", "vegetation"]
FINE_TO_COARSE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
LISTS = {"train": "labelled_train.txt", "val": "labelled_test.txt"}


def read_mat(path: Path, key: str) -> np.ndarray:
    from scipy.io import loadmat

    try:
        return loadmat(path)[key]
    except Exception as error:  # of a damaged file scipy raises whatever its parser stumbles over
        raise UnreadableImage(f"{path}: not a MATLAB file with {key!r} ({error})") from None


def load_tile(path: Path) -> Image.Image:
    img = read_mat(path, "img")
    if img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] < 3 or not img.size:
        raise UnreadableImage(f"{path}: expected img as uint8 (H, W, 4), got {img.dtype} {img.shape}")
    return Image.fromarray(np.ascontiguousarray(img[..., :3]))


def open_split(root: Path, split: str) -> LabelledSet:
    ids = read_list(require(root, LISTS[split], name="potsdam"))
    return LabelledSet(
        "potsdam",
        [(root / "imgs" / f"{name}.mat", root / "gt" / f"{name}.mat") for name in ids],
        CLASSES,
        class_table(FINE_TO_COARSE),
        load_image=load_tile,
        read_ids=lambda path: read_mat(path, "gt").astype(np.int64),
    )
