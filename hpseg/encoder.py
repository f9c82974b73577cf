"""Training views as frozen tokens: straight from the backbone, or from memory where views never change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from hpseg.backbones import Backbone, Tokens
from hpseg.config import Config, UsageError
from hpseg.data.folder import PhotoFolder, Views, make_loader

CACHE_BYTES = 8 << 30

Keys = Iterable[list[tuple[int, int]]]


class Encoder:
    """Runs the backbone over batches of (epoch, index) keys, or with `cache_features` once per image in the beginning.

    `unreadable` collects the files that could not be decoded; a neighbour stood in for each.
    """

    def __init__(self, backbone: Backbone, dataset: PhotoFolder, config: Config, device: torch.device):
        self.backbone, self.dataset, self.workers, self.device = backbone, dataset, config.workers, device
        self.unreadable: set[str] = set()
        self.cache: Tokens | None = None
        if config.cache_features:
            self._fill_cache(config.batch_size)

    def __call__(self, keys: Keys, with_neighbors: bool = True) -> Iterator[tuple[Tokens, Tensor | None]]:
        """Yields, per batch of keys, the tokens of its views and the features of their jittered twins or None."""
        if self.cache is None:
            for views in make_loader(self.dataset, keys, self.workers):
                yield self._encode(views, with_neighbors)
            return
        for batch in keys:
            rows = torch.tensor([index for _, index in batch])
            yield Tokens(self.cache.features[rows].to(self.device), self.cache.neighbors[rows].to(self.device),
                         self.cache.grid), None

    def features(self, batches: list[list[int]], epoch: int) -> Iterator[Tensor]:
        """Features (B, T, C) of batches of image numbers, seen as in the given epoch."""
        for tokens, _ in self([[(epoch, index) for index in batch] for batch in batches], with_neighbors=False):
            yield tokens.features

    def _encode(self, views: Views, with_neighbors: bool) -> tuple[Tokens, Tensor | None]:
        self.unreadable.update(views.unreadable)
        tokens = self.backbone(views.images.to(self.device, non_blocking=True), with_neighbors)
        if views.jittered is None or not with_neighbors:
            return tokens, None
        return tokens, self.backbone(views.jittered.to(self.device, non_blocking=True)).features

    def _fill_cache(self, batch_size: int) -> None:
        count, tokens = len(self.dataset), (self.dataset.size // self.backbone.patch) ** 2
        needed = count * tokens * (self.backbone.channels + 9) * 4
        if needed > CACHE_BYTES:
            raise UsageError(f"cache_features: {count} views need {needed / 2**30:.1f} GiB, expected at most "
                             f"{CACHE_BYTES >> 30} GiB; leave it off for this folder")
        keys = [[(0, index) for index in range(start, min(start + batch_size, count))]
                for start in range(0, count, batch_size)]
        parts = [self._encode(views, True)[0] for views in tqdm(
            make_loader(self.dataset, keys, self.workers), desc="features", total=len(keys), disable=None, leave=False)]
        self.cache = Tokens(torch.cat([part.features.cpu() for part in parts]),
                            torch.cat([part.neighbors.cpu() for part in parts]), parts[0].grid)
