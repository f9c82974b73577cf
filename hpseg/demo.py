"""`hpseg demo`: the whole path in a few minutes on two cores, without a network.

First it trains the Hidden Positives head on the photographs in this package and shows what it found, for the eye. Then
it measures: for every seed it draws texture mosaics with known masks, trains on them without looking at a mask, and
scores the head on unseen mosaics beside k-means on the same frozen features and on plain colours. The classes of the
mosaics are textures: each region has its own random colours, so colour says nothing about the class.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from hpseg.assets import PHOTOS
from hpseg.run.errors import UsageError
from hpseg.run.files import require_folder

TEXTURES = ("stripes", "checks", "dots", "bricks", "cells", "grain")
SIDE = 160  # of a mosaic, in pixels
REGIONS = 5  # of a mosaic
# On top of the preset for small folders, the learning rate and temperature of the published runs: here they do better.
PUBLISHED = dict(lr=5e-4, projection_lr=5e-4, temperature=0.8, lambda_warmup=100, pool_size=1024, renew_interval=100)
MOSAIC_SETTINGS = dict(size=SIDE, predict_size=SIDE, classes=len(TEXTURES), crop="center", **PUBLISHED)
PHOTO_SETTINGS = dict(size=224, predict_size=224, classes=12, batch_size=4, **PUBLISHED)
SHOWN = (  # of the photographs, in the picture
    "openimages_f1c765dc8f6c9bc0",
    "chelsea",
    "openimages_e34eb589a5bbe49b",
    "lomiri_aitzgorri",
    "usgov_19064748793",
    "sklearn_china",
)
HEIGHT = 160  # of each
METHODS = {"kmeans_rgb": "k-means, RGB", "kmeans_features": "k-means, frozen features", "trained": "trained head"}


def output_folder(out: Path | None, overwrite: bool) -> Path:
    """The folder to write to. Without `out`: demo, or the first of demo-2, demo-3, ... that is not in use."""

    def in_use(path):
        return path.is_file() or (path.is_dir() and any(path.iterdir()))

    if out is None:
        number, out = 1, Path("demo")
        while in_use(out) and not overwrite:
            number += 1
            out = Path(f"demo-{number}")
    elif in_use(out) and not overwrite:
        raise UsageError(f"--out: {out} is not empty; name another folder or give --overwrite")
    require_folder("--out", out)
    return out


def write_mosaics(folder: Path, count: int, seed: list[int], labels: bool) -> None:
    """Draw `count` mosaics into folder/images, and with `labels` their masks into folder/labels."""
    from hpseg.data.procedural import mosaic
    from hpseg.inference.pictures import label_image

    rng = np.random.default_rng(seed)
    for old in folder.glob("*/[0-9]*.png"):
        old.unlink()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if labels:
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "classes.json").write_text(json.dumps({"classes": TEXTURES}) + "\n")
    for number in range(count):
        image, mask = mosaic(rng, SIDE, TEXTURES, REGIONS)
        Image.fromarray(image).save(folder / "images" / f"{number:03d}.png")
        if labels:
            label_image(mask.astype(np.uint8)).save(folder / "labels" / f"{number:03d}.png")


def label(run: Path, train_images: Path, files: list[Path], seed: int):
    """The run, the pictures in `files`, and their clusters (H, W) uint8 by k-means on the frozen features of the
    training images and by the trained head."""
    import torch

    from hpseg.data.folder import find_images
    from hpseg.evaluation.contenders import KMeans
    from hpseg.inference.segmenter import load

    segmenter = load(run)

    def features(pixels):
        tokens = segmenter.backbone(pixels)
        return tokens.features.unflatten(1, tokens.grid)

    images = [Image.open(path).convert("RGB") for path in files]
    with torch.no_grad():
        fitted_to = [segmenter.prepare(path)[0] for path in find_images(train_images)]
        kmeans = KMeans(features, segmenter.config.classes, fitted_to, seed)
        by_kmeans = [kmeans.predict(*segmenter.prepare(image)) for image in images]
    return segmenter, images, by_kmeans, [segmenter.predict(image) for image in images]


def photographs(out: Path, common: dict) -> None:
    """Trains on the photographs: OUT/photographs, a run; OUT/photographs.jpg; OUT/overlays/, one for each; and the page
    about the run."""
    from scipy.optimize import linear_sum_assignment

    from hpseg.inference.label_map import agreement
    from hpseg.inference.pictures import contact_sheet, fitted, fitted_map, label_image, overlay
    from hpseg.reporting.report import write_report
    from hpseg.training.loop import train

    run, files = out / "photographs", sorted(PHOTOS.glob("*.jpg"))
    train(PHOTOS, run, seed=0, **PHOTO_SETTINGS, **common)
    segmenter, images, by_kmeans, by_head = label(run, PHOTOS, files, 0)
    # k-means takes the numbers, and so the colours, of the head's clusters that agree most with its own.
    numbers = linear_sum_assignment(agreement(by_kmeans, by_head), maximize=True)[1].astype(np.uint8)
    colours, columns = segmenter.key().colours, {}
    (out / "overlays").mkdir(exist_ok=True)
    for path, image, one, other in zip(files, images, by_kmeans, by_head, strict=True):
        overlay(image, other, colours=colours).save(out / "overlays" / path.name, quality=90)
        small, one, other = fitted(image, HEIGHT), fitted_map(numbers[one], HEIGHT), fitted_map(other, HEIGHT)
        maps = [label_image(labels, colours) for labels in (one, other)]
        columns[path.stem] = [small, *maps, overlay(small, other, colours=colours)]
    titles = ["photograph", "k-means, frozen features", "trained head", "overlay"]
    sheet = contact_sheet([columns[stem] for stem in SHOWN], titles, HEIGHT)
    sheet.save(out / "photographs.jpg", quality=90, subsampling=0)  # whole colours: borders are thin
    write_report(run, out=out / "report.html", n=16, seconds=15, overwrite=True, device=common["device"])


def mosaics(base: Path, train_images: int, test_images: int, seed: int, common: dict) -> dict:
    """Scores on the mosaics of a seed, in the folder `base`."""
    from hpseg.evaluation.evaluate import evaluate
    from hpseg.training.loop import train

    write_mosaics(base / "train", train_images, [seed, 0], labels=False)
    write_mosaics(base / "test", test_images, [seed, 1], labels=True)
    train(base / "train", base / "run", seed=seed, **MOSAIC_SETTINGS, **common)
    return evaluate(base / "run", base / "test", rgb=True, seed=seed, device=common["device"])


def draw_mosaics(base: Path, seed: int, out: Path) -> None:
    """Some mosaics of a seed, what they are, and what k-means and the head make of them."""
    from hpseg.data.datasets import open_data
    from hpseg.inference.label_map import Key, Matching
    from hpseg.inference.pictures import contact_sheet, fitted, fitted_map, label_image, letters, with_legend

    labelled = open_data(base / "test")
    pairs = labelled.pairs[:6]
    segmenter, images, by_kmeans, by_head = label(base / "run", base / "train", [image for image, _ in pairs], seed)
    truths = [np.asarray(Image.open(path)) for _, path in pairs]
    matching = Matching.fit(labelled, by_kmeans, truths)
    of_class, of_head = segmenter.key(as_classes=True), segmenter.key()
    keys = (of_class, Key.make(segmenter.config.classes, matching), of_head)
    columns = [
        [
            fitted(image, HEIGHT),
            *(label_image(fitted_map(labels, HEIGHT), key.colours) for labels, key in zip(maps, keys, strict=True)),
        ]
        for image, *maps in zip(images, truths, by_kmeans, by_head, strict=True)
    ]
    sheet = contact_sheet(columns, ["mosaic", "truth", "k-means, frozen features", "trained head"], HEIGHT)
    legend = Key.covering((of_class, truths), (of_head, by_head))
    with_legend(sheet, legend.names, legend.colours, letters(HEIGHT)).save(out, optimize=True)


def demo(
    out: Path | None,
    *,
    overwrite: bool,
    seeds: int,
    steps: int,
    train_images: int,
    test_images: int,
    backbone: str,
    weights: Path | None,
    device: str,
    news: Callable[[str], None],
) -> tuple[Path, dict]:
    """Does everything `hpseg demo` does; leaves photographs.jpg, overlays/, mosaics.png, results.json and the runs in a
    folder and returns it, with the results. news: called with a line for people whenever there is something to look at.
    """
    counts = {"seeds": seeds, "steps": steps, "train-images": train_images, "test-images": test_images}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"--{name}: expected at least 1, got {count}")
    started, out = time.perf_counter(), output_folder(out, overwrite)
    common = dict(steps=steps, backbone=backbone, weights=weights, device=device, overwrite=overwrite)
    photographs(out, common)
    seen = [out / name for name in ("report.html", "photographs.jpg", "overlays")]
    news(f"photographs: look at {', '.join(map(str, seen))}")
    scores = []
    for seed in range(seeds):
        scores.append(mosaics(out / f"seed{seed}", train_images, test_images, seed, common))
        values = ", ".join(f"{title} {scores[-1][method]['miou']:.1f}" for method, title in METHODS.items())
        news(f"mosaics, seed {seed}: mIoU {values}")
    draw_mosaics(out / "seed0", 0, out / "mosaics.png")
    results = {
        "seconds": round(time.perf_counter() - started, 1),
        "textures": TEXTURES,
        "backbone": scores[0]["backbone"],
        "steps": steps,
        "miou_mean": {m: float(np.mean([s[m]["miou"] for s in scores])) for m in METHODS},
        "miou": {m: [s[m]["miou"] for s in scores] for m in METHODS},
        "accuracy": {m: [s[m]["accuracy"] for s in scores] for m in METHODS},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return out, results


def table(results: dict) -> str:
    """mIoU in percent, one line per method, one column per seed and the mean."""
    titles = [f"seed {seed}" for seed in range(len(results["miou"]["trained"]))]
    lines = [
        f"mIoU on unseen mosaics of {len(TEXTURES)} textures, percent",
        " " * 26 + "".join(f"{title:>9}" for title in (*titles, "mean")),
    ]
    for method, title in METHODS.items():
        values = [*results["miou"][method], results["miou_mean"][method]]
        lines.append(f"{title:<26}" + "".join(f"{value:>9.1f}" for value in values))
    return "\n".join(lines)
