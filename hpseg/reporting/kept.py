"""Codes of training photographs from the features that a run keeps on the disk: no backbone has to run again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hpseg.data.folder import PhotoFolder
from hpseg.features.cache import FeatureCache
from hpseg.inference.segmenter import Segmenter
from hpseg.methods.base import method_class
from hpseg.models.backbone import Tokens
from hpseg.reporting.about import Run
from hpseg.reporting.photographs import scattered
from hpseg.run.errors import UsageError

MOST, SHARDS = 512, 8  # photographs, and the files that they are taken from: each is read as a whole


class Kept:
    """At most SHARDS shards of a run's cached features, spread over its photographs, which are named by `photographs`.

    Nothing is made: without a cache, or with one of other photographs, there are none.
    """

    def __init__(self, run: Run, segmenter: Segmenter):
        self.segmenter = segmenter
        self.photographs: dict[Path, tuple[FeatureCache, int]] = {}
        config = run.config
        folder = run.folder / "features" if config.cache_dir is None else Path(config.cache_dir)
        if not config.cache_features or not folder.is_dir():
            return
        try:
            dataset = method_class(config.method).open_photographs(config, segmenter.backbone)
            each = self._open(folder, dataset, dataset.files[:1]).per_shard
            firsts = list(range(0, len(dataset.files), each))
            chosen = sorted({firsts[number * len(firsts) // SHARDS] for number in range(SHARDS)})
            for first in chosen:
                self._add(self._open(folder, dataset, dataset.files[first : first + each]))
        except (UsageError, OSError):  # the photographs or the disk are not what they were
            return

    def _open(self, folder: Path, dataset: PhotoFolder, files: list[Path]) -> FeatureCache:
        part = PhotoFolder(files, dataset.size, dataset.crop, dataset.seed, False, dataset.read, dataset.resize)
        return FeatureCache(folder, False, self.segmenter.backbone, part, self.segmenter.config.cache_dtype)

    def _add(self, cache: FeatureCache) -> None:
        if cache.missing():
            return
        replaced = set(cache.unreadable)  # another picture stands in for them
        self.photographs |= {
            Path(file): (cache, index) for index, file in enumerate(cache.files) if file not in replaced
        }

    @torch.no_grad()
    def codes(self) -> Iterator[tuple[Path, Tensor]]:
        """(1, D, rows, columns) of at most MOST photographs, from everywhere among them."""
        files = list(self.photographs)
        device = next(self.segmenter.head.parameters()).device
        for place in scattered(len(files))[:MOST]:
            cache, index = self.photographs[files[place]]
            features, _, grid, colours = cache[index]
            tokens = Tokens(features.float().to(device), None, grid, None if colours is None else colours.to(device))
            yield files[place], self.segmenter.head.codes_of(tokens).transpose(1, 2).unflatten(2, grid)
