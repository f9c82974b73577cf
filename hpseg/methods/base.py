"""One published method a file: its trained parts, its loss and its schedule."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpseg.data.datasets import training_images
from hpseg.data.folder import PhotoFolder
from hpseg.features.tokens import Encoder, Keys
from hpseg.models.backbone import Backbone, Tokens
from hpseg.models.heads import Classifier, ClusterProbe, Head, SegmentationHead
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import Ranks, Share


@dataclass(frozen=True)
class Source:
    """Where a method gets tokens of training images outside of its steps."""

    encoder: Encoder
    ranks: Ranks
    batch_size: int  # of all ranks together
    dropout_rng: torch.Generator
    pool_rng: torch.Generator  # on the CPU
    run: Path  # its folder

    @property
    def images(self) -> int:
        """Number of training views."""
        return len(self.encoder.dataset)

    @torch.no_grad()
    def tokens(
        self, batches: list[list[int]], epoch: int, with_twins: bool = False
    ) -> Iterator[tuple[list[Tokens], Share]]:
        """Of each batch of view numbers, seen as in the given epoch, this rank's rows and which they are.

        The tokens are those of the views, without neighbour weights, and with_twins, where the set has them, those of
        their jittered twins.
        """
        shares = [Share(self.ranks, len(batch), self.dropout_rng) for batch in batches]
        # A rank without a row in a short last batch looks at one of its views all the same, and drops it.
        own = [batch[share.rows] or batch[:1] for batch, share in zip(batches, shares, strict=True)]
        keys = [[(epoch, index) for index in batch] for batch in own]
        for views, batch, share in zip(self.encoder(keys, False, with_twins), batches, shares, strict=True):
            held = len(batch[share.rows])
            yield (
                [
                    view._replace(features=view.features[:held], neighbors=None, colours=view.colours[:held])
                    for view in views
                    if view is not None
                ],
                share,
            )

    def features(self, batches: list[list[int]], epoch: int) -> Iterator[tuple[Tensor, Share]]:
        """The features (b, T, C) of `tokens`."""
        for (view,), share in self.tokens(batches, epoch):
            yield view.features, share

    def batches(self, images: list[int] | None = None) -> list[list[int]]:
        """Numbers of views, by default of all, as batches."""
        images = list(range(self.images)) if images is None else images
        return [images[first : first + self.batch_size] for first in range(0, len(images), self.batch_size)]


class Method(nn.Module, ABC):
    """What `hpseg train` asks of a method. `head` makes codes of tokens (heads.Head), `clusters` decides among classes
    by codes: the two, and `backbone` where it is trained, are what prediction reads."""

    TERMS: tuple[str, ...]  # names of the loss terms, columns of log.csv
    VIEWS = 1  # views per picture of a batch, as `keys` lists them

    head: Head
    clusters: nn.Module
    backbone: Backbone

    @staticmethod
    def open_photographs(config: Config, backbone: Backbone) -> PhotoFolder:
        """The training set at crops of `config.size` pixels, in whole patches; without a look at labels, unless the
        method learns from them. UsageError where the method cannot train on it: there is no run folder yet."""
        files, read = training_images(config.images, config.root)
        size, twins = backbone.snap(config.size), config.consistency_weight > 0
        return PhotoFolder(files, size, config.crop, config.seed, twins, read, config.resize)

    @staticmethod
    def parts(channels: int, config: Config) -> tuple[Head, ClusterProbe | Classifier]:
        """A head and its clusters, untrained; prediction makes them anew."""
        clusters = Classifier if config.learns_classes else ClusterProbe
        return SegmentationHead(channels, config.dim, config.dtype), clusters(config.dim, config.classes)

    def adopt(self, backbone: Backbone) -> None:
        """With `finetune`, before the next: takes a copy of the backbone to train, and sets `backbone`, see
        hpseg.models.finetune. `Encoder` and `Source` look through `backbone` from then on."""
        raise UsageError(f"finetune: expected a method that trains the backbone, got {type(self).__name__}")

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Made once, after `adopt`; stepped in this order."""

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters whose gradient `clip_norm` bounds."""
        return self.head.parameters()

    def prepare(self, source: Source) -> None:
        """Before the first step of a fresh run and of one that goes on."""

    def start(self, source: Source) -> None:
        """What a fresh run needs before its first step: pools, neighbours, ..."""

    def renew(self, step: int, source: Source) -> None:
        """Called before every step but the first."""

    def keys(self, batch: list[tuple[int, int]], step: int) -> list[tuple[int, int]]:
        """The (epoch, picture) of a step's views, in the order that `losses` expects, VIEWS for each picture of the
        batch; ranks take contiguous slices."""
        return batch

    def views(self, encoder: Encoder, keys: Keys) -> Iterator[tuple[Any, Any]]:
        """Batch by batch, the first two arguments of `losses`."""
        return encoder(keys)

    @abstractmethod
    def losses(self, view: Any, jittered: Any, step: int, seed: int, share: Share) -> dict[str, Tensor]:
        """Loss terms of one batch, 0-dim, to be summed; over ranks as hpseg.runtime.distributed says."""

    def follow(self) -> None:
        """What moves with a step but by no gradient; after losses, before optimizers."""

    def follow_up(self, step: int) -> None:
        """The same after optimizers."""

    def extra_state(self) -> dict[str, Any]:
        """What `start`, `renew` and the two above made and state_dict lacks, for the checkpoint."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None: ...


def lambda_at(step: int, config: Config) -> float:
    """Weight of task-specific positives: 0 up to the warm-up, then linear, reaching 1 at the end of the run.

    log.csv has it as "lambda", whatever the method.
    """
    if step <= config.lambda_warmup:
        return 0.0
    return (step - config.lambda_warmup) / (config.steps - config.lambda_warmup)


METHODS = {  # name -> module of this package, class
    "hp": ("hp", "HiddenPositives"),
    "stego": ("stego", "Stego"),
    "dgcl": ("dgcl.method", "Dgcl"),
    "lookbeyond": ("lookbeyond.method", "LookBeyond"),
    "fs4": ("fs4.method", "Fs4"),
}


def method_class(name: str) -> type[Method]:
    """The method of that name; its file is read when it is asked for."""
    module, found = METHODS[name]
    return getattr(importlib.import_module(f"hpseg.methods.{module}"), found)
