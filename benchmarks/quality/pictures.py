"""A picture of each method, of this package's own photographs and mosaics: docs/images/methods.jpg and dgcl.jpg.

    python -m benchmarks.quality.pictures [--steps 200] [--out docs/images]

The methods that need no labels train on the 53 photographs; DGCL on mosaics of textures, of which one in eight has
labels. Nothing is scored here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

import hpseg
from hpseg.assets import PHOTOS
from hpseg.demo import HEIGHT, SHOWN, TEXTURES, label, write_mosaics
from hpseg.inference.label_map import agreement
from hpseg.inference.pictures import contact_sheet, fitted, fitted_map, label_image

ROOT = Path(__file__).parents[2]
CLASSES = 12
METHODS = {
    "STEGO": {"preset": "stego-small"},
    "Hidden Positives": {"preset": "small"},
    "cross-image contrast": {"preset": "lookbeyond-small"},
    "FS^4": {"preset": "fs4-small"},
}


def of_photographs(folder: Path, settings: dict) -> Image.Image:
    """A column per photograph: itself, k-means, and each method. Clusters that agree most have one colour."""
    files = [PHOTOS / f"{stem}.jpg" for stem in SHOWN]
    rows: dict[str, list[np.ndarray]] = {}
    for title, own in METHODS.items():
        run = folder / str(own["preset"])
        hpseg.train(PHOTOS, run, classes=CLASSES, predict_size=224, **own, **settings)
        _, pictures, by_kmeans, by_method = label(run, PHOTOS, files, 0)
        base = rows.setdefault("k-means, frozen features", by_kmeans)
        numbers = np.argsort(linear_sum_assignment(agreement(base, by_method), maximize=True)[1]).astype(np.uint8)
        rows[title] = [numbers[labels] for labels in by_method]
    columns = [
        [fitted(picture, HEIGHT), *(label_image(fitted_map(maps[number], HEIGHT)) for maps in rows.values())]
        for number, picture in enumerate(pictures)
    ]
    return contact_sheet(columns, ["photograph", *rows], HEIGHT)


def of_mosaics(folder: Path, settings: dict) -> Image.Image:
    """A column per mosaic: itself, truth, what labels alone give, and DGCL."""
    write_mosaics(folder / "train", 64, [0, 0], labels=True)
    write_mosaics(folder / "test", 6, [0, 1], labels=True)
    files = sorted((folder / "test" / "images").iterdir())
    own = dict(preset="dgcl-small", classes=len(TEXTURES), labeled="1/8", size=160, predict_size=160)
    columns = [[Image.open(file)] for file in files]
    for column, file in zip(columns, files, strict=True):
        column.append(label_image(np.asarray(Image.open(folder / "test" / "labels" / file.name))))
    for name, change in (("alone", {"supervised_share": 1.0}), ("dgcl", {})):
        hpseg.train(folder / "train", folder / name, **(own | change), **settings)
        segmenter = hpseg.load(folder / name)
        for column, file in zip(columns, files, strict=True):
            column.append(label_image(segmenter.predict(file)))
    return contact_sheet(columns, ["mosaic", "truth", "labels of 8 mosaics alone", "DGCL"], HEIGHT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    settings = dict(steps=arguments.steps, seed=0, preview_every=0)
    for name, draw in (("methods", of_photographs), ("dgcl", of_mosaics)):
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder), settings).save(arguments.out / f"{name}.jpg", quality=88, subsampling=0)


if __name__ == "__main__":
    main()
