"""`hpseg demo`: the whole path in a few minutes on two cores, without a network.

For every seed it draws texture mosaics with known masks, trains the Hidden Positives head on them without looking at a
mask, and scores it on unseen mosaics beside k-means on the same frozen features and on plain colours. A last run
trains on the photographs in this package, for the eye only. The classes of the mosaics are textures: each region has
its own random colours, so colour says nothing about the class.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hpseg.assets import PHOTOS
from hpseg.run.errors import UsageError
from hpseg.run.files import require_folder

TEXTURES = ("stripes", "checks", "dots", "bricks", "cells", "grain")
SIDE = 160  # of a mosaic, in pixels
REGIONS = 5  # of a mosaic
# On top of the preset for small folders, the learning rate and temperature of the published runs: here they do better.
PUBLISHED = dict(lr=5e-4, projection_lr=5e-4, temperature=0.8, lambda_warmup=100, pool_size=1024, renew_interval=100)
MOSAIC_SETTINGS = dict(size=SIDE, predict_size=SIDE, classes=len(TEXTURES), crop="center", **PUBLISHED)
PHOTO_SETTINGS = dict(size=224, predict_size=224, classes=6, batch_size=4, **PUBLISHED)
SHOWN = ("usgov_19064748793", "usgov_33887522274", "usgov_18124840932", "chelsea")  # in the contact sheet
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


def blank(text: str, size: tuple[int, int]) -> Image.Image:
    """A white picture with a word in the middle."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((size[0] // 2, size[1] // 2), text, fill="gray", anchor="mm", font_size=size[1] // 10)
    return picture


def same_colours(maps: list[np.ndarray], like: list[np.ndarray]) -> list[np.ndarray]:
    """Renumber the clusters of `maps` one to one so that they agree with the maps `like` on most pixels."""
    from scipy.optimize import linear_sum_assignment

    from hpseg.evaluation.metrics import confusion

    counts = sum(confusion(one, other, 256, 256) for one, other in zip(maps, like, strict=True))
    renumbered = linear_sum_assignment(counts, maximize=True)[1].astype(np.uint8)
    return [renumbered[one] for one in maps]


def pictures(run: Path, train_images: Path, files: list[Path], labels: Path | None, seed: int):
    """One row of the contact sheet per file: image, truth, k-means, head, overlay.

    Clusters take the colours of the classes they match best, without labels the head's those of the k-means.
    """
    import torch

    from hpseg.data.folder import find_images
    from hpseg.evaluation.contenders import KMeans
    from hpseg.inference.pictures import label_image, overlay
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
    by_head = [segmenter.predict(image) for image in images]
    truths = [blank("no labels", image.size) for image in images]
    if labels:
        truths = [Image.open(labels / path.name) for path in files]
        by_kmeans = same_colours(by_kmeans, [np.asarray(truth) for truth in truths])
        by_head = same_colours(by_head, [np.asarray(truth) for truth in truths])
    else:
        by_head = same_colours(by_head, by_kmeans)
    return [
        [image, truth, label_image(one), label_image(other), overlay(image, other, 0.5)]
        for image, truth, one, other in zip(images, truths, by_kmeans, by_head, strict=True)
    ]


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
    scored: Callable[[int, dict], None],
) -> tuple[Path, dict]:
    """Does everything `hpseg demo` does; leaves results.json, contact_sheet.png and overlays/ in a folder and returns
    it, with the results. scored: called with each seed and its scores as soon as there are any."""
    from hpseg.evaluation.evaluate import evaluate
    from hpseg.inference.pictures import contact_sheet
    from hpseg.training.loop import train

    counts = {"seeds": seeds, "steps": steps, "train-images": train_images, "test-images": test_images}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"--{name}: expected at least 1, got {count}")
    started, out = time.perf_counter(), output_folder(out, overwrite)
    common = dict(steps=steps, backbone=backbone, weights=weights, device=device, overwrite=overwrite)
    rows, scores = [], []
    for seed in range(seeds):
        base = out / f"seed{seed}"
        write_mosaics(base / "train", train_images, [seed, 0], labels=False)
        write_mosaics(base / "test", test_images, [seed, 1], labels=True)
        train(base / "train", base / "run", seed=seed, **MOSAIC_SETTINGS, **common)
        scores.append(evaluate(base / "run", base / "test", rgb=True, seed=seed, device=device))
        scored(seed, scores[-1])
        if seed == 0:
            files = sorted((base / "test" / "images").iterdir())
            rows += pictures(base / "run", base / "train", files, base / "test" / "labels", seed)[:4]

    train(PHOTOS, out / "photographs", seed=0, **PHOTO_SETTINGS, **common)
    photographs = sorted(PHOTOS.glob("*.jpg"))
    shown = pictures(out / "photographs", PHOTOS, photographs, None, 0)
    (out / "overlays").mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        row[-1].save(out / "overlays" / f"mosaic{number}.jpg", quality=90)
    for path, row in zip(photographs, shown, strict=True):
        row[-1].save(out / "overlays" / path.name, quality=90)
    rows += [row for path, row in zip(photographs, shown, strict=True) if path.stem in SHOWN]
    sheet = contact_sheet(rows, ["image", "truth", "k-means, frozen features", "trained head", "overlay"])
    sheet.quantize(256).save(out / "contact_sheet.png", optimize=True)

    results = {
        "seconds": round(time.perf_counter() - started, 1),
        "textures": TEXTURES,
        "backbone": backbone,
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
