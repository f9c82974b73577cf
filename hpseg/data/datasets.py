"""Data sets with label maps, from their published folder layouts, with no preparation step.

A data set is named on the command line (`hpseg eval RUN cityscapes --root /data/cityscapes`); anything else is a folder
of one's own with `images/` and `labels/`. Label maps are int64 (H, W), -1 where nothing counts.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from hpseg.data.folder import find_images
from hpseg.data.transforms import UNDECODABLE, UnreadableImage, load_image
from hpseg.run.errors import UsageError

logger = logging.getLogger(__name__)
# name -> module of this package with `open_split(root, split) -> LabelledSet`
NAMES = {
    "cocostuff": "cocostuff",
    "cityscapes": "cityscapes",
    "cityscapes19": "cityscapes19",
    "potsdam": "potsdam",
    "voc": "voc",
}
SPLITS = ("train", "val")
LARGEST_CLASS = 255  # label maps are written with 8 bits
PICTURES, LABELS = ("images", "imgs", "img_dir"), ("labels", "ann_dir")  # names of the folders in one of one's own


def read_ids(path: Path) -> np.ndarray:
    """The numbers stored in a label picture, int64 (H, W), without turning palette indices into colours."""
    try:
        with Image.open(path) as picture:
            ids = np.asarray(picture)
    except UNDECODABLE as error:
        raise UnreadableImage(f"{path}: {error}") from None
    if ids.ndim != 2:
        raise UsageError(
            f"labels: {path} is a {picture.mode} picture, expected one channel of class ids (palette or gray)"
        )
    return ids.astype(np.int64)


@dataclass(frozen=True)
class LabelledSet:
    """Pictures and their label maps. `pairs` are (image, label) paths; `classes` the names of ids 0, 1, ...

    first_stuff: things are the classes before it, stuff those from it on; None where the set makes no difference.
    colours: RGB of ids 0, 1, ..., one for each of `classes`; empty where the set has none of its own.
    """

    name: str
    pairs: list[tuple[Path, Path]]
    classes: list[str]
    to_class: Callable[[np.ndarray], np.ndarray]  # ids as stored -> class numbers, -1 for void
    first_stuff: int | None = None
    colours: Sequence[tuple[int, int, int]] = ()
    load_image: Callable[[Path], Image.Image] = load_image
    read_ids: Callable[[Path], np.ndarray] = field(default=read_ids)

    @property
    def images(self) -> list[Path]:
        return [image for image, _ in self.pairs]

    def class_map(self, path: Path) -> np.ndarray:
        """The label map in a file, at its own size. UsageError if it cannot be read: scores without it are others."""
        try:
            truth = self.to_class(self.read_ids(path))
        except UnreadableImage as error:
            raise UsageError(f"labels: expected a label map, cannot read {error}") from None
        if truth.max(initial=-1) > LARGEST_CLASS:
            raise UsageError(
                f"labels: {path} has the id {truth.max()}, expected at most {LARGEST_CLASS}; --void names the one that "
                "does not count"
            )
        return truth

    def name_of(self, number: int) -> str:
        """Of a class; its number where the set names no such class."""
        return self.classes[number] if number < len(self.classes) else str(number)

    def colour_of(self, number: int) -> tuple[int, int, int] | None:
        """Of a class; None where the set has no colour for it."""
        return self.colours[number] if number < len(self.colours) else None

    def labels(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """The label map of a picture of `size` (width, height). UsageError if it has another size."""
        truth = self.class_map(path)
        if truth.shape != (size[1], size[0]):
            raise UsageError(
                f"labels: {path} is {truth.shape[1]} x {truth.shape[0]} pixels, its image {size[0]} x {size[1]}"
            )
        return truth


def class_table(mapping: dict[int, int] | list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """ids -> classes by a table; ids that it lacks are void."""
    pairs = mapping.items() if isinstance(mapping, dict) else enumerate(mapping)
    table = np.full(256, -1, np.int64)
    for stored, number in pairs:
        table[stored] = number
    return lambda ids: np.where((ids >= 0) & (ids < 256), table[ids & 255], -1)


def open_data(data: str | Path, root: str | Path | None = None, split: str = "val", void: int = 255) -> LabelledSet:
    """The data set `data` with its labels: a name of NAMES, found in `root`, or a folder of one's own."""
    if str(data) in NAMES:
        found = open_named(str(data), root, split)
        _require_files(found.name, [label for _, label in found.pairs])
        return found
    if root is not None:
        raise UsageError(f"root: goes with a data set's name ({', '.join(NAMES)}), got the folder {str(data)!r}")
    return open_folder(Path(data), void)


def open_named(name: str, root: str | Path | None, split: str) -> LabelledSet:
    """A data set by name; its labels are neither opened nor looked for."""
    if root is None:
        raise UsageError(f"root: expected the folder of {name}, got none; pass --root FOLDER")
    if split not in SPLITS:
        raise UsageError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    found = importlib.import_module(f"hpseg.data.sets.{NAMES[name]}").open_split(Path(root), split)
    _require_files(name, found.images)
    return found


def _require_files(name: str, paths: list[Path]) -> None:
    if not paths:
        raise UsageError(f"root: {name} lists no images")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UsageError(
            f"root: {name} expects {missing[0]}, which does not exist ("
            f"{len(missing)} of {len(paths)} files are missing)"
        )


def training_images(images: str, root: str | None) -> tuple[list[Path], Callable[[Path], Image.Image]]:
    """The pictures to train on, without a look at labels, and what reads one of them."""
    if images in NAMES:
        found = open_named(images, root, "train")
        return found.images, found.load_image
    if root is not None:
        raise UsageError(f"root: goes with a data set's name ({', '.join(NAMES)}), got the folder {images!r}")
    return find_images(picture_folder(Path(images))), load_image


def picture_folder(folder: Path) -> Path:
    """The folder itself, or its pictures alone where it holds label maps beside them, as `open_folder` has it."""
    if any((folder / name).is_dir() for name in LABELS):
        return next((folder / name for name in PICTURES if (folder / name).is_dir()), folder)
    return folder


def require(root: Path, *parts: str, name: str) -> Path:
    """root/parts, which must exist; the error says what was looked for and what is there."""
    path = root.joinpath(*parts)
    if path.exists():
        return path
    level = path
    while not level.is_dir() and level != level.parent:
        level = level.parent
    held = ", ".join(sorted(entry.name for entry in level.iterdir())[:6]) or "nothing"
    raise UsageError(f"root: {name} expects {path}, which does not exist; {level} holds: {held}")


def open_folder(root: Path, void: int = 255) -> LabelledSet:
    """ROOT/images and ROOT/labels with the same path below them up to the ending; names, and colours where it has
    some, from ROOT/classes.json.

    `imgs/` and `img_dir/` serve as images/, `ann_dir/` as labels/. Ids are classes, `void` does not count.
    """
    folders = {}
    for part, names in (("images", PICTURES), ("labels", LABELS)):
        folders[part] = next((root / name for name in names if (root / name).is_dir()), None)
        if folders[part] is None:
            held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) if root.is_dir() else "no such folder"
            raise UsageError(f"data: expected folders images/ and labels/ in {str(root)!r}, found: {held}")
    images, labels = (
        {path.relative_to(folder).with_suffix(""): path for path in find_images(folder)} for folder in folders.values()
    )
    pairs = [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    if not pairs:
        raise UsageError(
            f"data: no image in {folders['images']} has a label of the same name in {folders['labels']}; "
            f"for example {min(images)} and {min(labels)}"
        )
    if len(pairs) < len(images):
        logger.warning(f"{len(images) - len(pairs)} of {len(images)} images have no label and are left out")
    names, colours = _read_classes(root / "classes.json")
    return LabelledSet(root.name, pairs, names, lambda ids: np.where(ids == void, -1, ids), colours=colours)


def _read_classes(path: Path) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names of classes 0, 1, ... from a list in JSON or the list "classes" of an object, and the colours in its list
    "palette", where it has one: as many triples of red, green and blue in 0..255. None of both without the file."""
    if not path.is_file():
        return [], []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"data: {path} is not JSON ({error})") from None
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list):
        raise UsageError(f'data: {path}: expected a list of class names, or {{"classes": [...]}}')
    colours = content.get("palette", []) if isinstance(content, dict) else []
    if not isinstance(colours, list) or len(colours) not in (0, len(names)):
        got = f"{len(colours)} of them" if isinstance(colours, list) else repr(colours)
        raise UsageError(f"data: {path}: palette: expected {len(names)} colours, one for each class, got {got}")
    for name, colour in zip(names, colours):
        if not (isinstance(colour, list) and len(colour) == 3 and all(_is_byte(value) for value in colour)):
            raise UsageError(
                f"data: {path}: palette: expected [red, green, blue] in 0 to 255 for {name!r}, got {colour!r}"
            )
    return [str(name) for name in names], [(red, green, blue) for red, green, blue in colours]


def _is_byte(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255


def read_list(path: Path) -> list[str]:
    """The names in a text file, parted by white space."""
    try:
        return path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        raise UsageError(f"root: {path} is not a text file of names") from None
