"""Training views as frozen tokens: straight from the backbone, or windows of whole photographs cached on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from hpseg.data.folder import PhotoFolder, Views, hash_seed, load_batches
from hpseg.features.cache import FeatureCache, cache_folder
from hpseg.models.backbone import Backbone, Tokens
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import ALONE, Ranks
from hpseg.runtime.profile import stage

Keys = Iterable[list[tuple[int, int]]]


class Encoder:
    """Runs the backbone over batches of (epoch, index) keys; with `cache_features`, once `fill` has run, not any more.

    The cache holds the tokens of whole photographs, with their short side at the size of a crop; a view is then a
    square window of tokens, central or anywhere as `config.crop` says. It lies in `config.cache_dir`, else in
    RUN/features. `unreadable` collects the files that could not be decoded; a neighbour stood in for each.
    """

    def __init__(self, backbone: Backbone, dataset: PhotoFolder, config: Config, device: torch.device, run: Path):
        self.backbone, self.dataset, self.config, self.device = backbone, dataset, config, device
        if config.jitter == "normalized":
            dataset.normalisation = (backbone.mean[0].cpu(), backbone.std[0].cpu())
        self.unreadable: set[str] = set()
        self.cache: FeatureCache | None = None
        if config.cache_features:
            own = config.cache_dir is None
            self.cache = FeatureCache(cache_folder(config, run), own, backbone, dataset, config.cache_dtype)
            self.cache.require_space()

    def fill(self, ranks: Ranks = ALONE) -> None:
        """Makes the cached features that are still missing; all ranks call it, and each makes a share."""
        if self.cache is not None:
            self.cache.fill(self._whole_photographs, ranks)
            self.skip(self.cache.unreadable)

    def __call__(
        self, keys: Keys, with_neighbors: bool = True, with_twins: bool = True
    ) -> Iterator[tuple[Tokens, Tokens | None]]:
        """Yields, per batch of keys, the tokens of its views and of their jittered twins, where the set has them."""
        if self.cache is not None:
            for batch in keys:
                views = [self._window(*key) for key in batch]
                yield (
                    Tokens(
                        torch.cat([view.features for view in views]).to(self.device),
                        torch.cat([view.neighbors for view in views]).to(self.device),
                        views[0].grid,
                        torch.cat([view.colours for view in views]).to(self.device),
                    ),
                    None,
                )
            return
        for views in load_batches(self.dataset, keys, self.config.workers):
            yield self._encode(views, with_neighbors, with_twins)

    def skip(self, unreadable: list[str]) -> None:
        """Remembers files that could not be decoded; UsageError with `config.strict`."""
        if unreadable and self.config.strict:
            raise UsageError(f"strict: {unreadable[0]} cannot be decoded; remove or mend it, or pass --no-strict")
        self.unreadable.update(unreadable)

    def _encode(self, views: Views, with_neighbors: bool, with_twins: bool) -> tuple[Tokens, Tokens | None]:
        self.skip(views.unreadable)
        images, jittered = views.images.to(self.device, non_blocking=True), views.jittered if with_twins else None
        if jittered is not None:
            jittered = jittered.to(self.device, non_blocking=True)
        with stage("backbone"):
            tokens = self.backbone(images, with_neighbors)
            return tokens, None if jittered is None else self.backbone(jittered)

    def _whole_photographs(self, indices: list[int]) -> Iterator[tuple[Tokens, list[str]]]:
        whole = self.dataset.whole(self.backbone.patch)
        for views in load_batches(whole, [[(0, index)] for index in indices], self.config.workers):
            yield self._encode(views, with_neighbors=True, with_twins=False)[0], views.unreadable

    def _window(self, epoch: int, index: int) -> Tokens:
        """A square window of a photograph's tokens; taps that reach out of the window are dropped."""
        features, neighbors, (rows, columns), colours = self.cache[index]
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
        features, colours = (x.unflatten(1, (rows, columns))[cut].flatten(1, 2).float() for x in (features, colours))
        return Tokens(features, taps.flatten(3).flatten(1, 2), (side, side), colours)
