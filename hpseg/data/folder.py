"""A folder of photographs as a training set. Every view is a function of (seed, epoch, index) and of nothing else, so
neither the number of workers nor an interruption changes what a run sees."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hpseg.data.transforms import UnreadableImage, five_crop, jitter, load_image, short_side, square, to_tensor
from hpseg.run.errors import UsageError

EXTENSIONS = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".pgm",
    ".pnm",
    ".tga",
    ".avif",
    ".jp2",
}


def find_images(folder: str | Path) -> list[Path]:
    """All pictures in `folder` and below, sorted; hidden files and folders are left out."""
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"images: no folder {str(root)!r}; expected a folder of photographs, searched recursively")
    files = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise UsageError(
            f"images: no pictures in {str(root)!r} (looked for {' '.join(sorted(EXTENSIONS))} in it and below; "
            f"it holds: {found})"
        )
    return sorted(files)


def hash_seed(*parts: int | str) -> int:
    """63 bits that depend on all of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Views(NamedTuple):
    """A batch: images (B, 3, S, S) uint8, the same after jitter or None, and the unreadable files met on the way."""

    images: Tensor
    jittered: Tensor | None
    unreadable: list[str]


class PhotoFolder(Dataset):
    """Items are addressed by (epoch, index); index runs over images, or over five crops of each with crop "five"."""

    def __init__(
        self,
        files: list[Path],
        size: int,
        crop: str,
        seed: int,
        with_jitter: bool,
        read: Callable[[Path], Image.Image] = load_image,
        resize: str = "bilinear",
    ):
        self.files, self.size, self.crop, self.seed, self.with_jitter = files, size, crop, seed, with_jitter
        self.read, self.resize = read, resize
        self.patch: int | None = None
        self.normalisation: tuple[Tensor, Tensor] | None = None  # for jitter, where that is of normalised pictures

    def whole(self, patch: int) -> PhotoFolder:
        """The same pictures uncut: short side at `size`, the long one at whole patches."""
        uncut = PhotoFolder(self.files, self.size, self.crop, self.seed, False, self.read, self.resize)
        uncut.patch = patch
        return uncut

    def __len__(self) -> int:
        return len(self.files) * (5 if self.crop == "five" else 1)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor | None, list[str]]:
        """(3, S, S) uint8, its jittered twin or None, and unreadable files (the next readable one stands in)."""
        epoch, index = key
        image_index, which = divmod(index, 5) if self.crop == "five" else (index, None)
        image, unreadable = None, []
        for step in range(len(self.files)):
            path = self.files[(image_index + step) % len(self.files)]
            try:
                image = self.read(path)
                break
            except UnreadableImage:
                unreadable.append(str(path))
        if image is None:
            raise UsageError(
                f"images: none of the {len(self.files)} pictures can be decoded, for example {self.files[0]}"
            )
        if which is not None:
            image = five_crop(image, which)
        if self.patch is not None:
            return to_tensor(short_side(image, self.size, self.patch, self.resize)), None, unreadable
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch, index)) if self.crop == "random" else None
        view, twin = to_tensor(square(image, self.size, generator, self.resize)), None
        if self.with_jitter:
            twin = jitter(view, hash_seed("jitter", self.seed, epoch, index), self.normalisation)
        return view, twin, unreadable


def _collate(items: list[tuple[Tensor, Tensor | None, list[str]]]) -> Views:
    images, jittered, unreadable = zip(*items, strict=True)
    named = [name for names in unreadable for name in names]
    return Views(torch.stack(images), None if jittered[0] is None else torch.stack(jittered), named)


def epoch_batches(
    length: int, batch_size: int, seed: int, start_step: int, steps: int
) -> Iterator[list[tuple[int, int]]]:
    """Keys of the batches of steps start_step .. steps - 1: a permutation per epoch, incomplete batches dropped."""
    per_epoch = length // batch_size
    order: tuple[int, list[int]] = (-1, [])
    for step in range(start_step, steps):
        epoch, position = divmod(step, per_epoch)
        if order[0] != epoch:
            generator = torch.Generator().manual_seed(hash_seed("order", seed, epoch))
            order = (epoch, torch.randperm(length, generator=generator).tolist())
        yield [(epoch, index) for index in order[1][position * batch_size : (position + 1) * batch_size]]


class _Told(Dataset):
    """Items of a dataset, or the UsageError about one: raised in a loading process, it would come with a traceback."""

    def __init__(self, dataset: Dataset, collate: Callable):
        self.dataset, self.collate_items = dataset, collate

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UsageError as error:
            return error

    def collate(self, items: list) -> Any:
        errors = [item for item in items if isinstance(item, UsageError)]
        if errors:
            return errors[0]
        batch = self.collate_items(items)
        if get_worker_info() is not None:  # here, not in a thread of torch's, whose error would be waited for for ever
            for part in batch:
                if isinstance(part, Tensor):
                    part.share_memory_()
        return batch


def _say_nothing_of_lost_connections(_worker: int) -> None:
    """In a loading process: its thread that hands tensors over prints a traceback if the training process ends
    meanwhile, as it does after the death of another one. Errors of the dataset travel another way."""
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not isinstance(error, (ConnectionError, EOFError)):
            report(kind, error, trace)

    sys.excepthook = hook


def load_batches(
    dataset: Dataset, batches: Iterator[list] | list[list], workers: int, collate: Callable = _collate
) -> Iterator[Any]:
    """Loads the given batches of keys in order; workers < 0 takes half of the processors, eight at most, shared by the
    ranks that torchrun started on this machine.

    RuntimeError that begins with "DataLoader worker" if a loading process dies, as torch has it; UsageError as the
    dataset raises it.
    """
    if workers < 0:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, max(1, (os.cpu_count() or 1) // (2 * ranks)))
    told = _Told(dataset, collate)
    loader = DataLoader(
        told,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=told.collate,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_say_nothing_of_lost_connections,
    )
    views = iter(loader)
    while True:
        try:
            batch = next(views, None)
        except (ConnectionError, EOFError) as error:  # it died while it handed a tensor over
            time.sleep(5)  # torch's handler of the signal raises here; later it would raise anywhere
            raise RuntimeError(f"DataLoader worker ended while it sent a batch: {type(error).__name__}") from error
        if batch is None:
            return
        if isinstance(batch, UsageError):
            raise batch
        yield batch
