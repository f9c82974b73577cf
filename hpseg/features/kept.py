"""Frozen tokens of whole pictures for scoring: from the run's training cache, else computed once and kept.

`hpseg eval` and `hpseg probe` look at the same pictures call after call, and on a CPU the backbone is most of their
time. A photograph that the run was trained on is in its feature cache already. What the backbone says of another
picture is kept beside that cache:

    pictures/<recipe>-<picture>.safetensors    features (T, C) and colours (T, 3), fp32; grid (2,) int64

The name has the backbone and the very pixels in it, so whatever changes how a picture is read or resized gives another
name. Nothing is kept for a run without a feature cache, nor on a GPU, which computes tokens as fast as a disk reads
them. A folder takes KEPT_BYTES at most; pictures beyond are computed each time. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hpseg.data.datasets import training_images
from hpseg.data.folder import PhotoFolder
from hpseg.features.cache import FeatureCache, backbone_recipe, cache_folder, hashed
from hpseg.models.backbone import Backbone, Tokens
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.run.files import Damaged, read_checked, remove_temporaries, save_checked, write_atomically

logger = logging.getLogger(__name__)
FORMAT = 2  # to be raised when the same pixels give other tokens
KEPT_BYTES = 2 << 30  # of one folder
SPARE_BYTES = 1 << 30  # of the disk, left free
FILE = re.compile(r"([0-9a-f]{16})-[0-9a-f]{32}\.safetensors")
COLOUR_ROUNDING = 1e-6  # of a mean of numbers in [0, 1], on another device; another picture differs by more


class KeptTokens:
    """`kept(pixels)`: tokens of a prepared picture (1, 3, H, W) uint8, those of the backbone bit for bit, without
    neighbour weights. Reads and writes files where the run that was trained has a feature cache."""

    def __init__(self, backbone: Backbone, config: Config, run: Path):
        self.backbone, self.config, self.run = backbone, config, run
        self.folder = cache_folder(config, run) / "pictures"
        self.recipe = hashed([FORMAT, backbone_recipe(backbone), backbone.patch, torch.__version__])[:16]
        self.writes = config.cache_features
        self.taken: int | None = None  # bytes in the folder, once it was looked at

    def __call__(self, pixels: Tensor, photograph: Path | None = None, keep: bool = True) -> Tokens:
        """photograph: the file of the picture, which the run may have seen. keep: for the next time."""
        if photograph is not None and (found := self._of_run(photograph, pixels)) is not None:
            return found
        if not self.config.cache_features or pixels.device.type != "cpu":
            return self.backbone(pixels)
        digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
        digest.update(pixels.contiguous().numpy().data)
        path = self.folder / f"{self.recipe}-{digest.hexdigest()[:32]}.safetensors"
        tokens = self._read(path)
        if tokens is None:
            tokens = self.backbone(pixels)
            if keep and self.writes:
                self._write(path, tokens)
        return tokens

    def _of_run(self, photograph: Path, pixels: Tensor) -> Tokens | None:
        """From the run's feature cache, if `pixels` are what it saw of that file: their colours tell."""
        if self._cache is None:
            return None
        index = self._numbers.get(photograph.resolve())
        if index is None or not self._cache.holds(index):
            return None
        tokens, patch = self._cache[index], self.backbone.patch
        if tokens.grid != (pixels.shape[2] // patch, pixels.shape[3] // patch):
            return None
        colours = F.avg_pool2d(pixels.float() / 255, patch).flatten(2).transpose(1, 2)
        if not torch.allclose(colours, tokens.colours.to(colours), rtol=0, atol=COLOUR_ROUNDING):
            return None
        return Tokens(tokens.features.to(pixels.device), None, tokens.grid, tokens.colours.to(pixels.device))

    @cached_property
    def _cache(self) -> FeatureCache | None:
        """The run's own, where it holds what prediction sees: the whole picture, at its size, unrounded."""
        config, size = self.config, self.backbone.snap(self.config.size)
        wanted = config.cache_features and config.cache_dtype == "fp32" and config.images
        if not wanted or size != config.predict_size or config.resize != "bilinear":
            return None
        try:
            files, read = training_images(config.images, config.root)
        except UsageError:  # the photographs were moved since
            return None
        photographs = PhotoFolder(files, size, config.crop, config.seed, False, read, config.resize)
        return FeatureCache(cache_folder(config, self.run), config.cache_dir is None, self.backbone, photographs)

    @cached_property
    def _numbers(self) -> dict[Path, int]:
        return {Path(name).resolve(): number for number, name in enumerate(self._cache.files)}

    def _read(self, path: Path) -> Tokens | None:
        """None for what was never kept, or is damaged."""
        if not path.is_file():
            return None
        try:
            tensors, _ = read_checked(path)
        except Damaged:
            return None
        rows, columns = tensors["grid"].tolist()
        return Tokens(tensors["features"][None], None, (rows, columns), tensors["colours"][None])

    def _write(self, path: Path, tokens: Tokens) -> None:
        tensors = {"features": tokens.features[0], "colours": tokens.colours[0], "grid": torch.tensor(tokens.grid)}
        content = save_checked({name: value.detach().contiguous() for name, value in tensors.items()}, {})
        try:
            if self.taken is None:
                self.taken = self._prepare()
            room = min(KEPT_BYTES - self.taken, shutil.disk_usage(self.folder).free - SPARE_BYTES)
            if len(content) > room:
                raise OSError(f"{self.taken >> 20} MiB are taken")
            write_atomically(path, content)
            self.taken += len(content)
        except OSError as error:
            self.writes = False
            logger.info(f"features: no more pictures are kept in {self.folder} ({error}); they are computed each time")

    def _prepare(self) -> int:
        """Makes the folder, removes what a run no longer wants from its own, and returns the bytes in it."""
        own, taken = self.config.cache_dir is None, 0
        self.folder.mkdir(parents=own, exist_ok=True)  # nobody misses a shared folder that is gone
        remove_temporaries([self.folder], own)
        for path in self.folder.iterdir():
            named = FILE.fullmatch(path.name)
            if named and own and named[1] != self.recipe:  # of another backbone
                path.unlink(missing_ok=True)
            else:
                taken += path.stat().st_size
        return taken
