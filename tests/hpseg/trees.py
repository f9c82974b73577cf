"""Tiny data sets in the published on-disk formats, and the pieces they are made of."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.io import savemat
from tiny import paint

WIDTH, HEIGHT = 48, 32
COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]], np.uint8)  # of the blocks


def save_ids(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(ids, np.uint8)).save(path)


def save_photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    paint(WIDTH, HEIGHT, seed).save(path)


def halves(left, right):
    ids = np.full((HEIGHT, WIDTH), left)
    ids[:, WIDTH // 2 :] = right
    return ids


def make_cocostuff(root):
    pictures = {"train2017": ("000000000009", "000000000025"), "val2017": ("000000000139", "000000000285")}
    for split, names in pictures.items():
        for seed, name in enumerate(names):
            save_photo(root / "images" / split / f"{name}.jpg", seed)
            save_ids(root / "annotations" / split / f"{name}.png", halves(0, 255 if seed else 181))
    for split, suffix in (("train2017", ""), ("val2017", "_7")):
        path = root / "curated" / split / f"Coco164kFull_Stuff_Coarse{suffix}.txt"
        path.parent.mkdir(parents=True)
        path.write_text("000000000009\n000000000025\n" if split == "train2017" else "000000000139\n")


def make_cityscapes(root):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        save_photo(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", len(city))
        save_ids(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", halves(7, 4))


def make_potsdam(root):
    for name in ("imgs", "gt"):
        (root / name).mkdir(parents=True)
    for seed, name in enumerate(("2_10_0_0", "2_10_0_1", "7_9_3_3")):
        pixels = np.asarray(paint(WIDTH, HEIGHT, seed))
        savemat(root / "imgs" / f"{name}.mat", {"img": np.concatenate([pixels, pixels[..., :1]], 2)})
        savemat(root / "gt" / f"{name}.mat", {"gt": halves(4, 255).astype(np.uint8)})
    (root / "labelled_train.txt").write_text("2_10_0_0\n2_10_0_1\n")
    (root / "labelled_test.txt").write_text("7_9_3_3\n")


def make_voc(root):
    inner = root / "VOCdevkit" / "VOC2012"
    (inner / "ImageSets" / "Segmentation").mkdir(parents=True)
    for seed, (split, name) in enumerate((("train", "2007_000032"), ("train", "2007_000039"), ("val", "2007_000033"))):
        save_photo(inner / "JPEGImages" / f"{name}.jpg", seed)
        save_ids(inner / "SegmentationClass" / f"{name}.png", halves(1, 255))
        with open(inner / "ImageSets" / "Segmentation" / f"{split}.txt", "a") as file:
            file.write(name + "\n")


MAKERS = {
    "cocostuff": make_cocostuff,
    "cityscapes": make_cityscapes,
    "cityscapes19": make_cityscapes,
    "potsdam": make_potsdam,
    "voc": make_voc,
}


def make_blocks(root):
    """Twelve pictures of three colours in blocks, and their label maps; classes 0 to 2 in all of them."""
    for i in range(12):
        random = np.random.default_rng(i)
        labels = random.permuted(np.arange(9) % 3).reshape(3, 3).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        noise = random.integers(-25, 25, (48, 48, 3))
        save_ids(root / "labels" / f"{i}.png", labels)
        save_ids(root / "images" / f"{i}.png", np.clip(COLOURS[labels] + noise, 0, 255))
