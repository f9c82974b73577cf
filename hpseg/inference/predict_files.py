"""Label maps for files: `hpseg predict RUN PHOTOS... --out FOLDER`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from hpseg.data.folder import find_images
from hpseg.data.transforms import UnreadableImage, as_picture, load_image, skip
from hpseg.inference.label_map import Key
from hpseg.inference.pictures import label_image, overlay, with_legend
from hpseg.inference.segmenter import load
from hpseg.run.errors import UsageError
from hpseg.run.files import remove_temporaries, require_folder, write_array, write_image

FORMATS = ("png", "npy")


class Job(NamedTuple):
    """A picture to label: where it comes from, what reads it, and its name below the output folder, with its ending."""

    source: Path
    read: Callable[[], Image.Image]
    name: Path


def predict_files(
    run: str | Path,
    images: Iterable[str | Path],
    out: str | Path,
    *,
    overlay_alpha: float | None = None,
    legend: bool = True,
    format: str = "png",
    overwrite: bool = False,
    strict: bool = False,
    device: str = "auto",
    **options,
) -> list[str]:
    """Writes OUT/<name>.png, or .npy, per picture and, with `overlay_alpha`, OUT/<name>_overlay.jpg. Returns the files
    that could not be read; they are named and skipped.

    images: files, folders searched recursively, or .npy arrays uint8 (H, W, 3) or (N, H, W, 3), whose pictures get the
    names <stem>_0, <stem>_1, ... Names keep the path below a given folder.
    format: "png" with a palette that makes labels visible, or "npy", an array (H, W) uint8.
    strict: a picture that cannot be read is a UsageError instead.
    options: of `Segmenter.predict`.

    Two pictures that would share a name, and without `overwrite` a file that is already there, are an error before
    anything is written. A picture that was given is never written over.
    """
    if overlay_alpha is not None and not 0 <= overlay_alpha <= 1:
        raise UsageError(f"overlay: expected an opacity in [0, 1], got {overlay_alpha}")
    if format not in FORMATS:
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    endings = [f".{format}", *["_overlay.jpg"] * (overlay_alpha is not None)]
    targets = _targets(find_jobs(images), Path(out), endings, overwrite)
    segmenter, unreadable = load(run, device), []
    remove_temporaries({target.parent for _, (target, *_) in targets}, own=False)
    key = segmenter.key(options.get("as_classes", False))
    for job, (target, *overlaid) in tqdm(targets, desc="predict", unit="image", disable=None):
        try:
            picture = job.read()
        except UnreadableImage as error:
            skip(error, strict)
            unreadable.append(str(job.source))
            continue
        labels = segmenter.predict(picture, **options)
        target.parent.mkdir(parents=True, exist_ok=True)
        if format == "npy":
            write_array(target, labels)
        else:
            write_image(target, label_image(labels, key.colours))
        if overlay_alpha is not None:
            shown = overlay(picture, labels, overlay_alpha, key.colours)
            if legend:
                covering = Key.covering((key, [labels]))
                shown = with_legend(shown, covering.names, covering.colours)
            write_image(overlaid[0], shown, quality=92)
    if len(unreadable) == len(targets):
        raise UsageError(f"images: none of the {len(targets)} pictures can be decoded, e.g. {unreadable[0]}")
    return unreadable


def find_jobs(images: Iterable[str | Path]) -> list[Job]:
    """The pictures of files, .npy arrays and folders, in the order given."""
    jobs = []
    for given in map(Path, images):
        if given.suffix == ".npy" and given.is_file():
            pictures = read_arrays(given)
            for number, picture in enumerate(pictures):
                stem = given.stem if len(pictures) == 1 else f"{given.stem}_{number:0{len(str(len(pictures) - 1))}}"
                jobs.append(Job(given, partial(_of_array, picture), Path(f"{stem}.npy")))
            continue
        if not given.exists():
            raise UsageError(f"images: no file or folder {str(given)!r}")
        for path in [given] if given.is_file() else find_images(given):
            name = Path(path.name) if given.is_file() else path.relative_to(given)
            jobs.append(Job(path, partial(load_image, path), name))
    if not jobs:
        raise UsageError("images: expected pictures, folders of them or .npy arrays, got none")
    return jobs


def _of_array(picture: np.ndarray) -> Image.Image:
    return as_picture(np.array(picture))  # read from the disk here


def read_arrays(path: Path) -> np.ndarray:
    """The pictures (N, H, W, 3) uint8 of an .npy file, read from the disk as they are used."""
    try:
        pictures = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"images: {path} is not a readable .npy array ({error})") from None
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or pictures.shape[-1] != 3 or not pictures.size:
        raise UsageError(
            f"images: {path}: expected uint8 (H, W, 3) or (N, H, W, 3), got {pictures.dtype} {pictures.shape}"
        )
    return pictures if pictures.ndim == 4 else pictures[None]


def _targets(jobs: list[Job], out: Path, endings: list[str], overwrite: bool) -> list[tuple[Job, list[Path]]]:
    """The files to write for every job, the label map first."""
    require_folder("out", out)
    taken: dict[Path, Job] = {}
    targets = []
    for job in jobs:
        # a.jpg beside a.png: the second keeps its ending, so that both are written.
        for stem in dict.fromkeys((job.name.with_suffix(""), job.name)):
            files = [out / f"{stem}{ending}" for ending in endings]
            if not any(file in taken for file in files):
                break
        else:
            clash = next(file for file in files if file in taken)
            raise UsageError(f"images: {job.source} and {taken[clash].source} would both be written to {clash}")
        taken.update(dict.fromkeys(files, job))
        targets.append((job, files))
    given = {os.path.realpath(job.source) for job in jobs}
    for file, job in taken.items():
        if file.is_dir():
            raise UsageError(f"out: {file} is a folder, expected a file for the label map of {job.source}, or none")
        if os.path.realpath(file) in given:
            raise UsageError(
                f"out: {file}, the label map of {job.source}, would replace a picture; name another folder"
            )
    present = [file for file in taken if file.exists()]
    if present and not overwrite:
        raise UsageError(
            f"out: {present[0]} is already there ({len(present)} of {len(taken)} files are); pass --overwrite to "
            "replace them, or another folder"
        )
    return targets
