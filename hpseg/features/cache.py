"""Tokens of whole photographs on the disk, so that further epochs and further runs skip the frozen backbone.

A folder of shards, each the tokens of some consecutive photographs:

    <name>.safetensors    features (R, C) fp32 or bf16, neighbors (R, 9) and colours (R, 3) fp32: the patches of its
                          photographs, in order
                          grids (n, 2) int64: rows and columns of each photograph
        metadata          description: JSON of the recipe (backbone, transform), the files and what was unreadable
                          sha256: of the description and the tensors

The name is a hash of recipe and files (path, size, time of change), so a shard of anything else is never taken for one
that is wanted, one folder serves many runs and settings, and there is no index that could disagree with the shards. A
shard is written under a temporary name and renamed: a run killed at any moment leaves complete shards, and the next one
makes the rest. Shards are mapped into memory, not read: what is resident is for the operating system to decide.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpseg.data.folder import PhotoFolder
from hpseg.models.backbone import Backbone, Tokens
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.run.files import Damaged, read_checked, remove_temporaries, require_folder, save_checked, write_atomically
from hpseg.runtime.distributed import ALONE, Ranks
from hpseg.runtime.messages import progress

logger = logging.getLogger(__name__)
FORMAT = 2  # to be raised when the same recipe gives other tokens
SHARD_BYTES = 64 << 20  # about so much a shard: what a kill may cost, and what is held in memory while filling
ASPECT = 1.6  # of a typical photograph, for the estimate of sizes
SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")
TENSORS = ("features", "neighbors", "colours", "grids")
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Tokens (1, T, .) of photographs by number, in order, each with the files that were unreadable before one was not.
Encode = Callable[[list[int]], Iterable[tuple[Tokens, list[str]]]]


class Shard(NamedTuple):
    features: Tensor
    neighbors: Tensor
    colours: Tensor
    grids: list[tuple[int, int]]
    starts: list[int]  # first row of each photograph
    unreadable: list[str]


class FeatureCache:
    """Tokens (1, T, C) of photograph `index` as `cache[index]`, after `fill`.

    folder: of the shards; `own` says that it is one run's, and then shards that this run has no use for are removed.
    dtype: of the stored features. Opening writes nothing.
    """

    def __init__(self, folder: Path, own: bool, backbone: Backbone, dataset: PhotoFolder, dtype: str = "fp32"):
        self.folder, self.own, self.dtype = folder, own and not folder.is_symlink(), dtype
        if not own:
            require_folder("cache_dir", folder)
        self.files = [str(path) for path in dataset.files]
        self.recipe = {
            "format": FORMAT,
            **backbone_recipe(backbone),
            "short side": dataset.size,
            "patch": backbone.patch,
            "interpolation": "bilinear, antialiased" if dataset.resize == "bilinear" else dataset.resize,
            "stored as": dtype,
        }
        patches = (dataset.size // backbone.patch) ** 2 * ASPECT
        self.photograph_bytes = patches * (backbone.channels * STORED[dtype].itemsize + (9 + 3) * 4)
        self.per_shard = max(1, int(SHARD_BYTES // self.photograph_bytes))
        self.problems: list[str] = []  # what is wrong with shards that were found
        # Named now and not when written: should a photograph change in between, its old tokens get the old name.
        self.paths = [self._name(first) for first in range(0, len(self.files), self.per_shard)]
        numbers = range(len(self.paths))
        self.shards = [self._open(number) for number in progress(numbers, "check features", len(numbers), "shard")]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tokens:
        """Mapped tensors, features as stored and the others fp32: to be sliced first, converted and moved then."""
        number, place = divmod(index, self.per_shard)
        shard = self.shards[number]
        rows, columns = shard.grids[place]
        part = slice(shard.starts[place], shard.starts[place] + rows * columns)
        features, neighbors, colours = (x[None, part] for x in (shard.features, shard.neighbors, shard.colours))
        return Tokens(features, neighbors, (rows, columns), colours)

    def holds(self, index: int) -> bool:
        """Whether the tokens of photograph `index` are here, and are its own: none stood in for an unreadable one."""
        shard = self.shards[index // self.per_shard]
        return shard is not None and self.files[index] not in shard.unreadable

    def require_space(self) -> None:
        """UsageError where the disk is too small for what is missing."""
        needed, free = self.missing_bytes(), self._free_bytes()
        if needed > free:
            raise UsageError(
                f"cache_features: about {needed / 2**30:.1f} GiB are needed in {self.folder}, where "
                f"{free / 2**30:.1f} GiB are free; name a folder on another disk with --cache-dir, halve it with "
                "--cache-dtype bf16, or pass --no-cache-features"
            )

    @property
    def unreadable(self) -> list[str]:
        return [path for shard in self.shards if shard is not None for path in shard.unreadable]

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [number for number, shard in enumerate(self.shards) if shard is None]

    def missing_bytes(self) -> float:
        """About what the missing shards will take."""
        return sum(len(self._photographs(number)) for number in self.missing()) * self.photograph_bytes

    def fill(self, encode: Encode, ranks: Ranks = ALONE) -> None:
        """Makes what is missing, each rank a share, a shard at a time. After every one ranks hear of each other: none
        waits longer for another than a shard takes. The first rank alone says what was found, and how far it is."""
        missing = ranks.from_first(self._begin)
        own = [index for number in missing[ranks.rank :: ranks.size] for index in self._photographs(number)]
        tokens = iter(progress(encode(own), "features", len(own)) if ranks.writes else encode(own))
        for first in range(0, len(missing), ranks.size):
            with ranks.agree():
                for number in missing[first : first + ranks.size][ranks.rank :][:1]:
                    self._write(number, tokens)
        next(tokens, None)  # past the end, which takes the bar away
        with ranks.agree():
            for number in self.missing():
                self.shards[number] = self._open(number)
                if self.shards[number] is None:
                    raise UsageError(f"cache_dir: {self.paths[number]} was made by another process and cannot be read")

    def _begin(self) -> list[int]:
        """Numbers of the shards to be made, after a word on what was found, and the folder for them."""
        for number in self.missing():  # another run may have made them since
            self.shards[number] = self._open(number)
        missing, others = self.missing(), self._others()
        for problem in dict.fromkeys(self.problems):
            logger.info(f"features: {problem}")
        if others and (missing or self.own):
            fate = "removed" if self.own else "left as they are"
            difference = self._difference(next(iter(others.values())))
            logger.info(f"features: {self.folder} holds shards ({len(others)}) of {difference}; {fate}")
        if self.own:
            for path in others:
                path.unlink(missing_ok=True)
        if not missing:
            logger.info(f"features: those of all {len(self)} photographs are in {self.folder}")
            return missing
        count = sum(len(self._photographs(number)) for number in missing)
        logger.info(
            f"features: {len(self) - count} of {len(self)} photographs are in {self.folder}, the others "
            f"take about {self.missing_bytes() / 2**30:.2f} of {self._free_bytes() / 2**30:.1f} GiB that are free"
        )
        self._prepare()
        return missing

    def _photographs(self, number: int) -> range:
        first = number * self.per_shard
        return range(first, min(first + self.per_shard, len(self.files)))

    def _name(self, first: int) -> Path:
        files = [[name, *file_identity(name)] for name in self.files[first : first + self.per_shard]]
        return self.folder / f"{hashed([self.recipe, files])[:32]}.safetensors"

    def _open(self, number: int) -> Shard | None:
        """The shard if it is there, whole, and of the files as they are now."""
        path = self.paths[number]
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_checked(path)
        except Damaged as error:
            self.problems.append(f"{path.name} is damaged ({error}) and is made anew")
            return None
        description = json.loads(metadata["description"])
        changed = [name for name, identity in description["files"].items() if file_identity(name) != identity]
        if changed:  # one that stood in for an unreadable one; the shard's own files are in its name
            self.problems.append(f"{changed[0]} has changed, {path.name} is made anew")
            return None
        grids = [tuple(grid) for grid in tensors["grids"].tolist()]
        ends = tensors["grids"].prod(1).cumsum(0).tolist()
        rows = (tensors[name] for name in TENSORS[:3])
        return Shard(*rows, grids, [0, *ends[:-1]], description["unreadable"])

    def _write(self, number: int, tokens: Iterator[tuple[Tokens, list[str]]]) -> None:
        features, neighbors, colours, grids, unreadable = [], [], [], [], []
        seen = {}
        for index in self._photographs(number):
            found, skipped = next(tokens)
            features.append(found.features[0].to("cpu", STORED[self.dtype]))
            neighbors.append(found.neighbors[0].cpu())
            colours.append(found.colours[0].cpu())
            grids.append(found.grid)
            unreadable += skipped
            for step in range(len(skipped) + 1):  # the file itself, and those that were tried in its place
                name = self.files[(index + step) % len(self.files)]
                seen[name] = file_identity(name)
        rows = [torch.cat(parts) for parts in (features, neighbors, colours)]
        tensors = dict(zip(TENSORS, [*rows, torch.tensor(grids)], strict=True))
        description = json.dumps({"recipe": self.recipe, "files": seen, "unreadable": sorted(set(unreadable))})
        content = save_checked(tensors, {"description": description})
        try:
            write_atomically(self.paths[number], content)
        except OSError as error:
            raise self._unwritable(error) from None
        self.shards[number] = self._open(number)
        if self.shards[number] is None:
            raise UsageError(f"cache_dir: what was just written cannot be read back: {self.problems[-1]}")

    def _others(self) -> dict[Path, dict]:
        """Shards in the folder that are not of this run, with their recipes; nothing else that may lie there."""
        found, wanted = {}, set(self.paths)
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if SHARD.fullmatch(path.name) and path not in wanted:
                try:
                    with safe_open(path, "pt") as file:
                        found[path] = json.loads((file.metadata() or {})["description"])["recipe"]
                except (SafetensorError, ValueError, OSError, KeyError):
                    continue
        return found

    def _difference(self, recipe: dict) -> str:
        """In words, what was made by `recipe` and would not be so now."""
        changes = [
            f"{name} {recipe.get(name)} instead of {value}"
            for name, value in self.recipe.items()
            if recipe.get(name) != value
        ]
        return ", ".join(changes) or "photographs that have been changed, moved, added or removed"

    def _free_bytes(self) -> int:
        return shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.is_dir())).free

    def _prepare(self) -> None:
        """Makes the folder and removes temporary files of killed runs: all of them in a run's own folder, only old
        ones in a shared folder, where another run may be writing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries([self.folder], self.own)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(f"cache_dir: cannot write to {self.folder} ({error}); name another folder with --cache-dir")


def file_identity(name: str) -> list[int]:
    """Size and time of change; zeros for a file that is gone."""
    try:
        status = os.stat(name)
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def cache_folder(config: Config, run: Path) -> Path:
    """Where the features of a run are kept: a folder that is shared, or RUN/features."""
    return run / "features" if config.cache_dir is None else Path(config.cache_dir)


def backbone_recipe(backbone: Backbone) -> dict[str, object]:
    """All of a backbone that decides which tokens it makes of given pixels, but for its patch."""
    return {
        "backbone": backbone.fingerprint,
        "architecture": hashed([repr(backbone.vit), backbone.vit.blocks[-1].attn.num_heads])[:16],
        "pos_embed": backbone.pos_embed,
        "computed in": backbone.dtype,
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
    }


def hashed(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
