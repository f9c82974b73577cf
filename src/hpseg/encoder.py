"""Training views as frozen tokens: straight from the backbone, or windows of whole photographs kept in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from hpseg.backbones import Backbone, Tokens
from hpseg.config import Config
from hpseg.data.folder import PhotoFolder, Views, hash_seed, make_loader

CACHE_BYTES = 8 << 30
ASPECT = 1.6  # of a typical photograph, for the estimate of the cache's size

Keys = Iterable[list[tuple[int, int]]]


class Encoder:
    """Runs the backbone over batches of (epoch, index) keys; with `cache_features` only once per photograph,
    unless that would take more than CACHE_BYTES.

    The cache holds the tokens of whole photographs, with their short side at the size of a crop; a view is then a
    square window of tokens, central or anywhere as `config.crop` says. `unreadable` collects the files that could not
    be decoded; a neighbour stood in for each.
    """

    def __init__(self, backbone: Backbone, dataset: PhotoFolder, config: Config, device: torch.device):
        self.backbone, self.dataset, self.config, self.device = backbone, dataset, config, device
        self.unreadable: set[str] = set()
        self.cache: list[Tokens] = (
            self._whole_photographs() if config.cache_features and self.cache_bytes() <= CACHE_BYTES else []
        )

    def cache_bytes(self) -> float:
        """About what the tokens of all photographs take."""
        side = self.dataset.size // self.backbone.patch
        return len(self.dataset) * side * side * ASPECT * (self.backbone.channels + 9) * 4

    def __call__(self, keys: Keys, with_neighbors: bool = True) -> Iterator[tuple[Tokens, Tensor | None]]:
        """Yields, per batch of keys, the tokens of its views and the features of their jittered twins or None."""
        if self.cache:
            for batch in keys:
                views = [self._window(*key) for key in batch]
                yield (
                    Tokens(
                        torch.cat([view.features for view in views]).to(self.device),
                        torch.cat([view.neighbors for view in views]).to(self.device),
                        views[0].grid,
                    ),
                    None,
                )
            return
        for views in make_loader(self.dataset, keys, self.config.workers):
            yield self._encode(views, with_neighbors)

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

    def _whole_photographs(self) -> list[Tokens]:
        count = len(self.dataset)
        loader = make_loader(
            self.dataset.whole(self.backbone.patch), [[(0, index)] for index in range(count)], self.config.workers
        )
        whole = []
        for views in tqdm(loader, desc="features", total=count, unit="image", disable=None, leave=False):
            tokens, _ = self._encode(views, with_neighbors=True)
            whole.append(Tokens(tokens.features.cpu(), tokens.neighbors.cpu(), tokens.grid))
        return whole

    def _window(self, epoch: int, index: int) -> Tokens:
        """A square window of a photograph's tokens; taps that reach out of the window are dropped."""
        features, neighbors, (rows, columns) = self.cache[index]
        side = self.dataset.size // self.backbone.patch
        top, left = (rows - side) // 2, (columns - side) // 2
        if self.config.crop == "random":
            generator = torch.Generator().manual_seed(hash_seed(self.config.seed, epoch, index))
            top, left = (
                int(torch.randint(free + 1, (), generator=generator)) for free in (rows - side, columns - side)
            )
        cut = (slice(None), slice(top, top + side), slice(left, left + side))
        taps = neighbors.unflatten(1, (rows, columns))[cut].unflatten(3, (3, 3)).clone()
        taps[:, 0, :, 0], taps[:, -1, :, 2], taps[:, :, 0, :, 0], taps[:, :, -1, :, 2] = 0, 0, 0, 0
        return Tokens(
            features.unflatten(1, (rows, columns))[cut].flatten(1, 2), taps.flatten(3).flatten(1, 2), (side, side)
        )
