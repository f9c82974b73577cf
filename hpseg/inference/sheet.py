"""`hpseg show RUN PHOTOS`: one picture that shows what a run has found, beside what it had to start from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpseg.data.transforms import UnreadableImage, skip
from hpseg.inference.pictures import contact_sheet, label_image, overlay, with_legend
from hpseg.inference.predict_files import find_jobs
from hpseg.inference.segmenter import load
from hpseg.run.errors import UsageError
from hpseg.run.files import require_file, write_image

MAX_HEIGHT = 2000  # of a row in pixels
TITLES = ["image", "clusters", "overlay", "frozen features, PCA"]


@torch.no_grad()
def show(
    run: str | Path,
    images: Iterable[str | Path],
    out: str | Path = "sheet.png",
    *,
    n: int = 16,
    height: int = 160,
    overwrite: bool = False,
    strict: bool = False,
    device: str = "auto",
    **options,
) -> Image.Image:
    """Writes and returns a contact sheet of `n` of the pictures, spread evenly over their sorted names.

    A row shows the picture, its clusters, both together, and the three principal components of its frozen features as
    red, green and blue; the components are those of all the pictures shown. height: of a row in pixels.
    strict: a picture that cannot be read is a UsageError. options: of `Segmenter.predict`.
    """
    out = Path(out)
    for name, value, most in (("n", n, math.inf), ("height", height, MAX_HEIGHT)):
        if not 1 <= value <= most:
            expected = "at least 1" if most == math.inf else f"1 to {most}"
            raise UsageError(f"{name}: expected {expected}, got {value}")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"out: expected a name that ends in .png, .jpg or .webp, got {str(out)!r}")
    require_file("out", out, overwrite)
    jobs = find_jobs(images)
    if overwrite and os.path.realpath(out) in {os.path.realpath(job.source) for job in jobs}:
        raise UsageError(f"out: {out} is one of the pictures to show; choose another name")
    chosen = [jobs[index] for index in np.linspace(0, len(jobs) - 1, min(n, len(jobs))).round().astype(int)]
    segmenter = load(run, device)
    key, rows, features = segmenter.key(options.get("as_classes", False)), [], []
    occurring: dict[int, str] = {}

    def frozen(part: Tensor) -> dict[str, Tensor]:
        tokens = segmenter.backbone(part)
        return {"features": tokens.features.transpose(1, 2).unflatten(2, tokens.grid)}

    for job in chosen:
        try:
            picture = job.read()
        except UnreadableImage as error:
            skip(error, strict)
            continue
        labels = segmenter.predict(picture, **options)
        bands = segmenter.bands(segmenter.prepare(picture)[0], frozen)
        features.append(torch.cat([band["features"] for band in bands], 2)[0].cpu())
        row = [picture, label_image(labels, key.colours).convert("RGB"), overlay(picture, labels, 0.5, key.colours)]
        for large in row:
            large.thumbnail((4 * height, 2 * height))  # a sheet of large photographs holds small ones
        rows.append(row)
        occurring |= key.of(labels)
    if not rows:
        raise UsageError(f"images: none of the {len(chosen)} pictures chosen can be decoded, e.g. {chosen[0].source}")
    for row, colours in zip(rows, principal_colours(features), strict=True):
        row.append(Image.fromarray(colours).resize(row[0].size, Image.Resampling.BILINEAR))
    sheet = with_legend(contact_sheet(rows, TITLES, height), dict(sorted(occurring.items())), key.colours)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image(out, sheet)
    return sheet


def principal_colours(features: list[Tensor], seed: int = 0) -> list[np.ndarray]:
    """The first three principal components of all features (C, h, w) together as colours: (h, w, 3) uint8 each.

    Every component is stretched from its 2nd to its 98th percentile.
    """
    rows = torch.cat([x.flatten(1).T for x in features])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, _, directions = torch.pca_lowrank(rows, q=3)
    components = (rows - rows.mean(0)) @ directions
    low, high = np.quantile(components.numpy(), (0.02, 0.98), axis=0)
    stretched = ((components.numpy() - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    counts = [x[0].numel() for x in features]
    parts = np.split((stretched * 255).round().astype(np.uint8), np.cumsum(counts)[:-1])
    return [part.reshape(*x.shape[1:], 3) for part, x in zip(parts, features, strict=True)]
