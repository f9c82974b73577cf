"""Cityscapes with the 19 classes that its benchmark scores. The layout is that of hpseg.data.sets.cityscapes: nobody
needs the `labelTrainIds` files that others make from it first."""

from __future__ import annotations

from pathlib import Path

from hpseg.data.datasets import LabelledSet
from hpseg.data.sets import cityscapes

LEFT_OUT = {"parking", "rail track", "guard rail", "bridge", "tunnel", "polegroup", "caravan", "trailer"}
KEPT = [number for number, name in enumerate(cityscapes.CLASSES) if name not in LEFT_OUT]  # of the 27
CLASSES = [cityscapes.CLASSES[number] for number in KEPT]
COLOURS = [cityscapes.COLOURS[number] for number in KEPT]


def open_split(root: Path, split: str) -> LabelledSet:
    table = {cityscapes.FIRST_ID + number: new for new, number in enumerate(KEPT)}
    return cityscapes.open_classes("cityscapes19", root, split, CLASSES, COLOURS, table)
