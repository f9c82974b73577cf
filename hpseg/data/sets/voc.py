"""Pascal VOC 2012 segmentation: 21 classes with the background, in the layout of the published archive.

    ROOT/ImageSets/Segmentation/{train,val}.txt, ROOT/JPEGImages/<id>.jpg, ROOT/SegmentationClass/<id>.png

ROOT is VOC2012 itself or the folder above VOCdevkit. `SegmentationClassAug` and `train_aug.txt` are used for training
where both are there (the usual 10,582 images).
"""

from __future__ import annotations

from pathlib import Path

from hpseg.data.datasets import LabelledSet, class_table, read_list, require

CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep "
    "sofa train monitor"
).split()


def open_split(root: Path, split: str) -> LabelledSet:
    inner = root / "VOCdevkit" / "VOC2012"
    root = inner if inner.is_dir() else root
    lists = require(root, "ImageSets", "Segmentation", name="voc")
    augmented = split == "train" and (lists / "train_aug.txt").is_file() and (root / "SegmentationClassAug").is_dir()
    ids = read_list(require(lists, "train_aug.txt" if augmented else f"{split}.txt", name="voc"))
    labels = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
    pairs = [(root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png") for name in ids]
    return LabelledSet("voc", pairs, CLASSES, class_table(list(range(len(CLASSES)))))
