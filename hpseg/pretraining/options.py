"""What can be chosen in training a ViT. Imports no torch, so that `hpseg distill --help` answers at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpseg.run.errors import UsageError

DTYPES = ("fp32", "bf16")
POSITIVE = ("batch_size", "minutes", "steps", "depth", "prototypes", "lr", "patch_size", "heads", "width", "crop")


def require_positive(options: Any, names: Iterable[str]) -> None:
    """UsageError where one of the options is given and not a positive number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")


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
        require_positive(self, POSITIVE)
        if self.small_crops < 0:
            raise UsageError(f"--small-crops: expected at least 0, got {self.small_crops}")
        if self.crop % (2 * self.patch_size):
            raise UsageError(f"--crop: expected a multiple of twice --patch-size {self.patch_size}, got {self.crop}")
        if self.width % self.heads:
            raise UsageError(f"--width: expected a multiple of --heads {self.heads}, got {self.width}")


@dataclass(frozen=True)
class DistillOptions:
    """Lengths are in pixels. What cannot be is a UsageError."""

    teacher: str
    teacher_weights: Path | None = None
    levels: str | None = (
        None  # stages of a convolutional teacher: STRIDE:WEIGHT, separated by commas; the deepest without
    )
    student: str = "vit_tiny8"  # or hybrid_tiny8, or any ViT of timm
    minutes: float = 120.0  # of training, unless there are `steps`
    steps: int | None = None
    batch_size: int = 32  # crops of the first of `sides`; of others as many as have as many pixels
    sides: tuple[int, ...] = (128, 96, 192)  # of the student's crops
    teacher_scale: float = 2.0  # side of the teacher's crops, in those of the student
    mix: float = 0.3  # probability that a crop gets a box of another one
    lr: float = 1.5e-3  # peak learning rate of AdamW
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0
    save_every: float = 120.0  # seconds
    note: str | None = None  # what whoever reads results must know of the weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(self.sides))
        require_positive(self, ("minutes", "steps", "batch_size", "teacher_scale", "lr", "save_every"))
        if not self.sides or min(self.sides) < 1:
            raise UsageError(f"--sides: expected numbers of pixels, got {list(self.sides)}")
        if not 0 <= self.mix <= 1:
            raise UsageError(f"--mix: expected a probability from 0 to 1, got {self.mix}")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
