"""What can be chosen in pre-training. Imports no torch, so that `hpseg pretrain --help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpseg.run.errors import UsageError

POSITIVE = ("batch_size", "minutes", "steps", "depth", "prototypes", "lr", "patch_size", "heads", "width", "crop")


@dataclass(frozen=True)
class Options:
    """Lengths are in pixels. What cannot be is a UsageError."""

    minutes: float = 40.0  # of training, unless there are `steps`
    steps: int | None = None
    batch_size: int = 12  # images per step
    procedural: float = 0.35  # fraction of the images drawn by hpseg.data.procedural
    lr: float = 1.5e-3  # peak learning rate of AdamW
    width: int = 192
    depth: int = 6
    heads: int = 3
    patch_size: int = 8
    crop: int = 96  # side of the large crops
    small_crops: int = 2  # of half that side, per image
    prototypes: int = 1024  # of the image term and of the patch term
    texture_weight: float = 4.0
    texture_first: float = 0.3  # fraction of the training that has the texture term alone
    device: str = "cpu"
    seed: int = 0
    save_every: float = 120.0  # seconds

    def __post_init__(self) -> None:
        if not 0 <= self.procedural <= 1:
            raise UsageError(f"--procedural: expected a fraction from 0 to 1, got {self.procedural}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
        if self.small_crops < 0:
            raise UsageError(f"--small-crops: expected at least 0, got {self.small_crops}")
        if self.crop % (2 * self.patch_size):
            raise UsageError(f"--crop: expected a multiple of twice --patch-size {self.patch_size}, got {self.crop}")
        if self.width % self.heads:
            raise UsageError(f"--width: expected a multiple of --heads {self.heads}, got {self.width}")
