"""Makes a labelled folder of 27 coarse classes from pictures of COCO with panoptic category ids.

    python -m benchmarks.quality.coco27 SOURCE OUT

SOURCE holds images/ and labels/ (PNGs of category ids, 0 is unlabelled) in folders of the same names below, and
classes.json with "coarse27_names" and "category_to_coarse27". OUT gets images/ and labels/ (class ids, 255 is void) as
copies, and classes.json. Left out are the pictures that the embedded ViTs were trained on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from hpseg.assets import EMBEDDED
from hpseg.data.folder import find_images

UNLABELLED = 0


def trained_on() -> set[str]:
    """Names, without folders and endings, of COCO's pictures that the embedded ViTs have seen."""
    facts = json.loads(EMBEDDED["embedded"].with_suffix(".json").read_text())
    names = " ".join(photograph["file"] for photograph in facts["photographs"])
    names += EMBEDDED["embedded"].with_name("README.md").read_text()  # those of embedded-selfsup
    return set(re.findall(r"\d{12}", names))


def prepare(source: Path, out: Path) -> int:
    """Writes the folder; returns the number of its pictures."""
    facts = json.loads((source / "classes.json").read_text())
    coarse = np.full(256, 255, np.uint8)
    for category, number in facts["category_to_coarse27"].items():
        coarse[int(category)] = number
    coarse[UNLABELLED] = 255
    labels = {path.stem: path for path in find_images(source / "labels")}
    seen, count = trained_on(), 0
    for part in ("images", "labels"):
        (out / part).mkdir(parents=True)
    for image in find_images(source / "images"):
        if image.stem in labels and image.stem not in seen:
            shutil.copy(image, out / "images" / image.name)
            ids = coarse[np.asarray(Image.open(labels[image.stem]))]
            Image.fromarray(ids).save(out / "labels" / f"{image.stem}.png")
            count += 1
    (out / "classes.json").write_text(json.dumps({"classes": facts["coarse27_names"]}) + "\n")
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    print(f"{prepare(options.source, options.out)} pictures in {options.out}")
