"""Settings of a training run: one frozen dataclass, saved as JSON with every run.

This module imports neither torch nor timm, so that `hpseg --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpseg.run.errors import UsageError
from hpseg.run.presets import METHOD_PRESETS, PRESETS
from hpseg.run.settings import (
    LEARN_FROM_LABELS,
    REQUIRED,
    TRAIN_BACKBONE,
    DgclSettings,
    Fs4Settings,
    HiddenPositivesSettings,
    LookBeyondSettings,
    StegoSettings,
    any_seed,
    at_least,
    dropped,
    fraction,
    numbers_of,
)

FORMAT = 1  # of a run folder; to be raised when what older versions wrote means something else


@dataclass(frozen=True)
class Config(HiddenPositivesSettings, StegoSettings, DgclSettings, LookBeyondSettings, Fs4Settings):
    """Everything that decides the result of `hpseg train`. Lengths are in pixels, rates are per step.

    The default of a setting is what was done before there was one: a run from then goes on as it began.
    """

    # What is trained, and on what
    images: str = ""  # folder of photographs, searched recursively, or a data set's name
    root: str | None = None  # folder of the named data set
    method: str = "hp"  # the published method, a file of hpseg.methods.base
    classes: int = at_least(2, 27)  # clusters to find
    preset: str = "small"  # where the values below came from
    backbone: str = "embedded"  # "embedded", or any timm ViT by name
    weights: str | None = None  # local checkpoint for the backbone
    dtype: str = "fp32"  # "bf16": autocast of backbone, heads and projection; the loss stays in fp32
    pos_embed: str = "timm"  # position embedding off its native grid: as "timm" or as the original "dino" code has it
    seed: int = any_seed(0)

    # The backbone, where it is trained
    finetune: bool = False  # the backbone is trained, too
    backbone_lr: float = at_least(0, 1e-4)  # its learning rate, that of its last block
    layer_decay: float = fraction(1.0)  # times this for every block below

    # Pictures
    size: int = at_least(16, 224)  # side of the square training crop, rounded to whole patches
    crop: str = "center"  # "center", "random", or "five": half-size corner and centre crops, as the published runs
    resize: str = "bilinear"  # training pictures: "bilinear", antialiased, or "nearest" as in the published code
    jitter: str = "image"  # of the "image", or of the "normalized" one, which clamps it, as in the published code
    predict_size: int = at_least(16, 320)  # short side at prediction
    cache_features: bool = False  # run the frozen backbone once per whole photograph; crops are windows of its tokens
    cache_dtype: str = "fp32"  # of the features on the disk, "fp32" or "bf16"

    # Optimisation (HP, section 4.1 and released configurations)
    steps: int = at_least(1, 1000)
    batch_size: int = at_least(1, 8)  # of one process; the config.json of a run has that of all its ranks together
    accumulate: int = at_least(1, 1)  # batches per step, each with pairs of its own; gradients are averaged
    lr: float = at_least(0, 5e-4)  # of the segmentation head
    weight_decay: float = at_least(0, 0.1)
    projection_lr: float = at_least(0, 5e-4)  # Adam
    cluster_lr: float = at_least(0, 5e-3)  # Adam, cluster probe
    clip_norm: float = at_least(0, 10.0)  # of the gradient of the head, and of a backbone that is trained; 0: none

    # Head and loss, as far as methods share them
    dim: int = at_least(1, 512)  # width D of the segmentation code
    dropout: float = dropped(0.1)  # channel dropout at the inputs of the head
    mining_dropout: float = dropped(0.1)  # channel dropout of the features and codes that mine pairs
    temperature: float = 0.8
    ema_momentum: float = fraction(0.99)
    consistency_weight: float = at_least(0, 0.05)  # distance to the photometrically jittered view; 0 leaves that out
    # Final centroids, unless labels are learned: "probe" as trained, "kmeans" over the codes of the training images
    clusters: str = "probe"

    # Labels, which nothing looks at unless asked to
    labeled: str | None = None  # list of the pictures whose labels are trained on, or a share of them as "1/8"
    select_on_labels: str | None = None  # labelled folder or data set whose labels choose the checkpoint
    select_root: str | None = None  # folder of that named data set; `root` if it is the one trained on
    select_every: int = at_least(1, 100)  # steps between scores on it

    # Machine; these may differ between a run and its resumption
    workers: int = at_least(-1, -1)  # data loading processes; -1 picks by the number of processors
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", ...
    save_every: int = at_least(1, 100)  # steps between checkpoints
    cache_dir: str | None = None  # folder for cached features that runs share; None keeps them in the run's folder
    preview_every: int = at_least(0, 200)  # steps between pictures of a few photographs' clusters; 0 makes none
    profile: bool = False  # time the stages of every step
    strict: bool = False  # a picture that cannot be decoded ends the run instead of being skipped
    tensorboard: bool = False  # curves and previews for TensorBoard, too
    compile: bool = False  # torch.compile of the blocks of the backbone and of the heads
    grad_checkpointing: bool = False  # with finetune: less memory, another forward pass of the backbone

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
            elif kind in _KINDS and (
                not isinstance(value, _KINDS[kind]) or isinstance(value, bool) != (kind == "bool")
            ):
                raise UsageError(f"{field.name}: expected {kind}, got {value!r}")
            low, high = field.metadata.get("bounds", (-math.inf, math.inf))
            if "bounds" in field.metadata and not low <= getattr(self, field.name) <= high:
                expected = f"at least {low}" if high == math.inf else f"a number in [{low}, {high}]"
                raise UsageError(f"{field.name}: expected {expected}, got {value}")
            if "numbers" in field.metadata:
                try:
                    numbers_of(value)
                except ValueError:
                    example = field.default
                    raise UsageError(f"{field.name}: expected numbers as {example!r}, got {value!r}") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name}: expected a finite number, got {value}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("backbone", "extractor"):
            if not _MODEL.fullmatch(getattr(self, name) or "embedded"):
                raise UsageError(
                    f"{name}: expected 'embedded' or the name of a timm model, got {getattr(self, name)!r}; --weights "
                    "names local weights"
                )
        if self.finetune and self.method not in TRAIN_BACKBONE:
            raise UsageError(f"finetune: expected with method {' or '.join(TRAIN_BACKBONE)} only, got {self.method!r}")
        if self.finetune and self.cache_features:
            raise UsageError(
                "cache_features: a backbone that is trained gives other features after every step; expected "
                "--no-cache-features with --finetune"
            )
        for name, only in REQUIRED.get(self.method, {}).items():
            if getattr(self, name) != only:
                raise UsageError(f"{name}: expected {only!r} with method {self.method}, got {getattr(self, name)!r}")
        if self.labeled is not None and self.method not in LEARN_FROM_LABELS:
            raise UsageError(
                f"labeled: expected with method {' or '.join(LEARN_FROM_LABELS)} only, got {self.labeled!r} with "
                f"{self.method!r}"
            )
        if self.grad_checkpointing and not self.finetune:
            raise UsageError("grad_checkpointing: a frozen backbone keeps no gradient; expected --finetune with it")
        if self.classes > 255:
            raise UsageError(f"classes: label maps are 8-bit, expected at most 255, got {self.classes}")
        if not self.temperature > 0:
            raise UsageError(f"temperature: expected a number above 0, got {self.temperature}")
        if self.cache_features and self.consistency_weight:
            raise UsageError(
                "cache_features: there are no jittered views of cached features; expected consistency_weight 0 or "
                f"--no-cache-features, got consistency_weight {self.consistency_weight}"
            )
        if self.select_root is not None and self.select_on_labels is None:
            raise UsageError(f"select_root: expected select_on_labels with it, got {self.select_root!r} alone")
        if self.cache_features and self.crop == "five":
            raise UsageError(
                "cache_features: crop 'five' enlarges half-size crops, not windows of the photograph's tokens; "
                "expected crop 'center' or 'random', or --no-cache-features"
            )
        if self.cache_dir is not None and not self.cache_features:
            raise UsageError(f"cache_dir: expected --cache-features with it, got {self.cache_dir!r} alone")

    @property
    def learns_classes(self) -> bool:
        """Whether cluster k is class k, as labels were trained on, and not one to be matched to a class."""
        return self.labeled is not None

    @property
    def labels_used(self) -> str | None:
        """In plain words what labels took part in, or None where none were looked at."""
        said = []
        if self.labeled is not None:
            said.append(f"Labels were trained on: {self.labeled}.")
        if self.select_on_labels is not None:
            said.append(f"Labels chose this checkpoint: the one of highest mIoU on {self.select_on_labels} was kept.")
        return " ".join(said) or None

    def save(self, path: Path) -> None:
        """All at once, so that a run has its settings or none."""
        from hpseg.run.files import write_json

        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})

    @staticmethod
    def load(path: Path) -> Config:
        """The settings of a run. Those that it lacks, as it is older than they are, have their defaults, whatever its
        preset is now."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: not a readable run configuration ({error})") from None
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != FORMAT:
            raise UsageError(
                f"{path}: a run folder of format {found}, this hpseg reads format {FORMAT}; use the version that made "
                "it, which results.json names, or train again"
            )
        _require_known(values)
        return Config(**values)


_KINDS = {"int": int, "float": float, "str": str, "bool": bool, "str | None": str | None}
_MODEL = re.compile(r"[\w.-]+")  # a name of timm's own list: neither a path nor a place on the network
CHOICES = {
    "method": tuple(METHOD_PRESETS),
    "crop": ("center", "random", "five"),
    "resize": ("bilinear", "nearest"),
    "jitter": ("image", "normalized"),
    "dtype": ("fp32", "bf16"),
    "pos_embed": ("timm", "dino"),
    "cache_dtype": ("fp32", "bf16"),
    "clusters": ("probe", "kmeans"),
    "weighting": ("pairs", "anchors", "separate"),
    "outlier_scope": ("per_cluster", "global"),
    "contrast_form": ("per_positive", "supcon"),
    "pixel_update": ("epoch", "running"),
    "pixel_balance": ("size", "inverse", "none"),
}
MACHINE_FIELDS = (
    *("workers", "device", "save_every", "preview_every"),
    *("profile", "strict", "tensorboard", "cache_dir", "compile", "grad_checkpointing"),
)


def make_config(preset: str | None = None, **overrides) -> Config:
    """The preset's values with `overrides` on top; an unknown name is an error that lists the known ones.

    preset: None is the one that the method starts from, METHOD_PRESETS.
    """
    if preset is None:
        preset = METHOD_PRESETS.get(overrides.get("method", "hp"), "small")
    if preset not in PRESETS:
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    _require_known(overrides)
    return Config(**{"preset": preset, **PRESETS[preset], **overrides})


def _require_known(settings: Iterable[str]) -> None:
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
