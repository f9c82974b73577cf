"""`hpseg show RUN PHOTOS`: one picture that shows what a run has found, beside what it had to start from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpseg.data.datasets import LABELS, NAMES, PICTURES, LabelledSet, open_data, picture_folder
from hpseg.data.transforms import UnreadableImage, skip
from hpseg.inference.label_map import NO_CLASS, Key, Matching
from hpseg.inference.pictures import contact_sheet, fitted, fitted_map, label_image, letters, overlay, with_legend
from hpseg.inference.predict_files import Job, find_jobs
from hpseg.inference.segmenter import Segmenter, load
from hpseg.run.errors import UsageError
from hpseg.run.files import require_file, write_image

MAX_HEIGHT = 2000  # of a row in pixels


@torch.no_grad()
def show(
    run: str | Path,
    images: Iterable[str | Path],
    out: str | Path = "sheet.png",
    *,
    root: str | Path | None = None,
    split: str = "val",
    void: int = 255,
    truth: bool = True,
    n: int = 16,
    height: int = 160,
    overwrite: bool = False,
    strict: bool = False,
    device: str = "auto",
    **options,
) -> Image.Image:
    """Writes and returns a contact sheet of `n` of the pictures, spread evenly over their sorted names.

    Below each picture stand its clusters, both together, and the three principal components of its frozen features as
    red, green and blue; the components are those of all the pictures shown. Where the one thing given is a data set,
    by its name and `root` or as a folder with images/ and labels/ (`split` and `void` as for `open_data`), the classes
    that its labels say come in between; a run that was not scored on it has its clusters matched to the classes of the
    pictures shown. truth: False leaves labels alone.
    height: of a row in pixels. strict: a picture that cannot be read is a UsageError. options: of `Segmenter.predict`.
    """
    out, given = Path(out), [Path(image) for image in images]
    for name, value, most in (("n", n, math.inf), ("height", height, MAX_HEIGHT)):
        if not 1 <= value <= most:
            expected = "at least 1" if most == math.inf else f"1 to {most}"
            raise UsageError(f"{name}: expected {expected}, got {value}")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"out: expected a name that ends in .png, .jpg or .webp, got {str(out)!r}")
    require_file("out", out, overwrite)
    labelled = _labelled(given, root, split, void)
    if labelled is None:
        jobs = find_jobs(picture_folder(path) if path.is_dir() else path for path in given)
    else:
        jobs = [Job(path, partial(labelled.load_image, path), Path(path.name)) for path in labelled.images]
        labelled = labelled if truth else None
    if overwrite and os.path.realpath(out) in {os.path.realpath(job.source) for job in jobs}:
        raise UsageError(f"out: {out} is one of the pictures to show; choose another name")
    chosen = np.linspace(0, len(jobs) - 1, min(n, len(jobs))).round().astype(int).tolist()
    segmenter = load(run, device)
    pictures, maps, truths, features = [], [], [], []

    def frozen(part: Tensor) -> dict[str, Tensor]:
        tokens = segmenter.backbone(part)
        return {"features": tokens.features.transpose(1, 2).unflatten(2, tokens.grid)}

    for index in chosen:
        try:
            picture = jobs[index].read()
        except UnreadableImage as error:
            skip(error, strict)
            continue
        if labelled:
            ids = labelled.labels(labelled.pairs[index][1], picture.size)
            truths.append(fitted_map(np.where(ids < 0, NO_CLASS, ids).astype(np.uint8), height))
        maps.append(fitted_map(segmenter.predict(picture, **options), height))
        bands = segmenter.bands(segmenter.prepare(picture)[0], frozen)
        features.append(torch.cat([band["features"] for band in bands], 2)[0].cpu())
        pictures.append(fitted(picture, height))  # a sheet of large photographs holds small ones
    if not pictures:
        raise UsageError(f"images: none of the {len(chosen)} pictures chosen can be decoded, e.g. {jobs[0].source}")
    key, of_truth = _keys(segmenter, given[0], labelled, maps, truths, options.get("as_classes", False))
    titles = ["photograph", *["truth"] * bool(labelled), "clusters", "overlay", "frozen features, PCA"]
    columns = []
    for number, (picture, labels, colours) in enumerate(zip(pictures, maps, principal_colours(features), strict=True)):
        views = [picture, *(label_image(part[number], of_truth.colours) for part in [truths] if part)]
        views += [label_image(labels, key.colours), overlay(picture, labels, colours=key.colours)]
        columns.append([*views, Image.fromarray(colours).resize(picture.size, Image.Resampling.BILINEAR)])
    labelled_parts = [labels[labels != NO_CLASS] for labels in truths]
    legend = Key.covering((key, maps), *([(of_truth, labelled_parts)] if truths else []))
    sheet = with_legend(contact_sheet(columns, titles, height), legend.names, legend.colours, letters(height))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image(out, sheet)
    return sheet


def _labelled(given: list[Path], root: str | Path | None, split: str, void: int) -> LabelledSet | None:
    """The data set that was given, by its name or as a folder; None for pictures alone."""
    if len(given) == 1 and (str(given[0]) in NAMES or all(_has(given[0], part) for part in (PICTURES, LABELS))):
        return open_data(str(given[0]), root, split, void)
    if root is not None:
        raise UsageError(f"root: goes with a data set's name ({', '.join(NAMES)}), got {', '.join(map(str, given))}")
    return None


def _has(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_dir() for name in names)


def _keys(
    segmenter: Segmenter,
    data: Path,
    labelled: LabelledSet | None,
    maps: list[np.ndarray],
    truths: list[np.ndarray],
    as_classes: bool,
) -> tuple[Key, Key]:
    """Names and colours of the maps, and of the truth, in which a class looks the same."""
    matching = segmenter.matching
    if labelled is not None and (matching is None or os.path.realpath(matching.data) != os.path.realpath(data)):
        if as_classes:
            raise UsageError(f"as_classes: the clusters have no classes of {data}; run `hpseg eval RUN {data}` first")
        matching = Matching.fit(labelled, maps, truths)
    clusters = segmenter.config.classes
    return Key.make(clusters, matching, as_classes), Key.make(clusters, matching, matching is not None)


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
