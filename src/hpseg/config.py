"""Settings of a training run: one frozen dataclass, saved as JSON with every run, and the presets as data.

This module imports neither torch nor timm, so that `hpseg --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


class UsageError(ValueError):
    """A setting, a path or a file is not what was expected; the message says which, its value and what to do."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of `hpseg train`. Lengths are in pixels, rates are per step."""

    # What is trained, and on what
    images: str = ""  # folder of photographs, searched recursively, or a data set's name
    root: str | None = None  # folder of the named data set
    method: str = "hp"  # the published method, a file of hpseg.methods
    classes: int = 27  # clusters to find
    preset: str = "small"  # where the values below came from
    backbone: str = "embedded"  # "embedded", or any timm ViT by name
    weights: str | None = None  # local checkpoint for the backbone
    dtype: str = "fp32"  # "fp32" or "bf16" for the frozen backbone
    seed: int = 0

    # Pictures
    size: int = 224  # side of the square training crop, rounded to whole patches
    crop: str = "center"  # "center", "random", or "five": half-size corner and centre crops, as the published runs
    predict_size: int = 320  # short side at prediction
    cache_features: bool = False  # run the frozen backbone once per whole photograph; crops are windows of its tokens

    # Optimisation (HP, section 4.1 and released configurations)
    steps: int = 1000
    batch_size: int = 8
    lr: float = 5e-4  # AdamW, segmentation head
    weight_decay: float = 0.1
    projection_lr: float = 5e-4  # Adam
    cluster_lr: float = 5e-3  # Adam, cluster probe
    clip_norm: float = 10.0  # of the segmentation head's gradient; 0 leaves it as it is

    # Hidden Positives
    dim: int = 512  # width D of the segmentation code
    dropout: float = 0.1  # channel dropout at the inputs of the head
    mining_dropout: float = 0.1  # channel dropout of the features and codes that mine positives
    temperature: float = 0.8
    negative_rate: float = 0.02  # share of the other patches in the denominator
    weighting: str = "pairs"  # "pairs", "anchors" or "separate", see hpkernels.hidden_positive_loss
    consistency_weight: float = 0.05  # distance to the photometrically jittered view; 0 leaves that view out
    ema_momentum: float = 0.99
    lambda_warmup: int = 1000  # steps before task-specific positives count, then a linear rise to 1
    pool_size: int = 2048  # rows of each reference pool
    pool_images: int = 2048  # at most so many images fill a pool
    renew_interval: int = 100  # steps between rebuilds of the task-specific pool
    clusters: str = "probe"  # final centroids: "probe" as trained, or "kmeans" over the codes of the training images

    # STEGO: weight and shift of the three correspondence terms
    self_weight: float = 0.1
    knn_weight: float = 1.0
    random_weight: float = 0.15
    self_shift: float = 0.12
    knn_shift: float = 0.2
    random_shift: float = 1.0
    neighbors: int = 7  # a view's partner is one of so many nearest views
    negative_images: int = 5  # random partners of a view
    feature_samples: int = 11  # points per side of a view that are compared
    pointwise: bool = True  # centre feature similarities per point

    # Machine; these may differ between a run and its resumption
    workers: int = -1  # data loading processes; -1 picks by the number of processors
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", ...
    save_every: int = 100  # steps between checkpoints

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
            elif kind in _KINDS and (
                not isinstance(value, _KINDS[kind]) or isinstance(value, bool) != (kind == "bool")
            ):
                raise UsageError(f"{field.name}: expected {kind}, got {value!r}")
        for name, low in _AT_LEAST.items():
            if not getattr(self, name) >= low:
                raise UsageError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("dropout", "mining_dropout", "negative_rate", "ema_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.classes > 255:
            raise UsageError(f"classes: label maps are 8-bit, expected at most 255, got {self.classes}")
        if not self.temperature > 0:
            raise UsageError(f"temperature: expected a number above 0, got {self.temperature}")
        if self.cache_features and self.consistency_weight:
            raise UsageError(
                "cache_features: there are no jittered views of cached features; expected consistency_weight 0 or "
                f"--no-cache-features, got consistency_weight {self.consistency_weight}"
            )
        if self.cache_features and self.crop == "five":
            raise UsageError("cache_features: expected crop 'center' or 'random', or --no-cache-features, got 'five'")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Config:
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{path}: not a readable run configuration ({error})") from None
        return make_config(**values)


_KINDS = {"int": int, "float": float, "str": str, "bool": bool}
_AT_LEAST = {
    "classes": 2,
    "size": 16,
    "predict_size": 16,
    "steps": 1,
    "batch_size": 1,
    "lr": 0,
    "weight_decay": 0,
    "projection_lr": 0,
    "cluster_lr": 0,
    "clip_norm": 0,
    "dim": 1,
    "consistency_weight": 0,
    "lambda_warmup": 0,
    "pool_size": 1,
    "pool_images": 1,
    "renew_interval": 1,
    "workers": -1,
    "save_every": 1,
    "neighbors": 1,
    "negative_images": 1,
    "feature_samples": 1,
}
CHOICES = {
    "method": ("hp", "stego"),
    "crop": ("center", "random", "five"),
    "dtype": ("fp32", "bf16"),
    "clusters": ("probe", "kmeans"),
    "weighting": ("pairs", "anchors", "separate"),
}
MACHINE_FIELDS = ("workers", "device", "save_every")

# The first three are the released configurations of Hidden Positives (CVPR 2023), the next three STEGO's (ICLR 2022);
# the small ones are for folders of some tens to some thousands of photographs and a few minutes on a CPU.
STEGO = dict(
    method="stego",
    steps=5000,
    crop="five",
    consistency_weight=0.0,
    weight_decay=0.0,
    clip_norm=0.0,
)
PRESETS: dict[str, dict] = {
    "cocostuff": dict(
        classes=27,
        steps=22_896,
        batch_size=64,
        crop="five",
        temperature=0.8,
        negative_rate=0.02,
        consistency_weight=0.05,
        ema_momentum=0.99,
        lambda_warmup=1000,
        dim=512,
        pool_size=2048,
        renew_interval=100,
    ),
    "cityscapes": dict(
        classes=27,
        steps=6_960,
        batch_size=64,
        crop="five",
        temperature=0.6,
        negative_rate=0.02,
        consistency_weight=0.05,
        ema_momentum=0.999,
        lambda_warmup=50,
        dim=512,
        pool_size=2048,
        renew_interval=20,
    ),
    "potsdam": dict(
        classes=3,
        steps=710,
        batch_size=64,
        crop="center",
        temperature=0.4,
        negative_rate=1.0,
        consistency_weight=0.0,
        ema_momentum=0.999,
        lambda_warmup=100,
        dim=256,
        pool_size=1024,
        renew_interval=20,
    ),
    # The published table for ViT-B/8 ("10/3"), with the dimension of the released checkpoint.
    "stego-cocostuff": STEGO
    | dict(
        classes=27,
        batch_size=32,
        dim=90,
        self_weight=0.1,
        knn_weight=1.0,
        random_weight=0.15,
        self_shift=0.12,
        knn_shift=0.2,
        random_shift=1.0,
    ),
    "stego-cityscapes": STEGO
    | dict(
        classes=27,
        batch_size=32,
        dim=100,
        self_weight=1.0,
        knn_weight=0.58,
        random_weight=0.91,
        self_shift=0.46,
        knn_shift=0.18,
        random_shift=0.31,
        pointwise=False,
    ),
    # ViT-S/8
    "stego-potsdam": STEGO
    | dict(
        classes=3,
        batch_size=16,
        dim=70,
        crop="center",
        self_weight=0.67,
        knn_weight=0.25,
        random_weight=0.63,
        self_shift=0.08,
        knn_shift=0.02,
        random_shift=0.46,
    ),
    "small": dict(
        steps=200,
        batch_size=8,
        crop="random",
        size=208,
        predict_size=208,
        cache_features=True,
        consistency_weight=0.0,
        lr=1e-3,
        projection_lr=1e-3,
        temperature=0.2,
        lambda_warmup=50,
        dim=128,
        pool_size=2048,
        renew_interval=50,
        clusters="kmeans",
    ),
    "stego-small": STEGO
    | dict(
        steps=400,
        batch_size=8,
        crop="random",
        size=208,
        predict_size=208,
        cache_features=True,
        dim=70,
        self_weight=0.67,
        knn_weight=0.25,
        random_weight=0.63,
        self_shift=0.08,
        knn_shift=0.02,
        random_shift=0.46,
        clusters="kmeans",
    ),
}


def make_config(preset: str = "small", **overrides) -> Config:
    """The preset's values with `overrides` on top; an unknown name is an error that lists the known ones."""
    if preset not in PRESETS:
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise UsageError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return Config(**{"preset": preset, **PRESETS[preset], **overrides})
