"""Settings of a training run: one frozen dataclass, saved as JSON with every run.

This module imports neither torch nor timm, so that `hpseg --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpseg.run.errors import UsageError
from hpseg.run.presets import METHOD_PRESETS, PRESETS
from hpseg.run.settings.declaration import checked
from hpseg.run.settings.methods import (
    LEARN_FROM_LABELS,
    REQUIRED,
    TRAIN_BACKBONE,
    DgclSettings,
    Fs4Settings,
    HiddenPositivesSettings,
    LookBeyondSettings,
    StegoSettings,
)
from hpseg.run.settings.shared import (
    BackboneTraining,
    HeadSettings,
    LabelSettings,
    MachineSettings,
    OptimisationSettings,
    PictureSettings,
    RunSettings,
)

FORMAT = 1  # of a run folder; to be raised when what older versions wrote means something else
MACHINE_FIELDS = tuple(field.name for field in dataclasses.fields(MachineSettings))


# Fields stand in config.json and in the signature from the last base to the first.
@dataclass(frozen=True)
class Config(
    MachineSettings,
    LabelSettings,
    HeadSettings,
    OptimisationSettings,
    PictureSettings,
    BackboneTraining,
    RunSettings,
    HiddenPositivesSettings,
    StegoSettings,
    DgclSettings,
    LookBeyondSettings,
    Fs4Settings,
):
    """Everything that decides the result of `hpseg train`. Lengths are in pixels, rates are per step.

    The default of a setting is what was done before there was one: a run from then goes on as it began.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
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
        if self.shifts == "quantiles":
            for name in ("self_shift", "knn_shift", "random_shift"):
                if not 0 <= getattr(self, name) <= 1:
                    raise UsageError(
                        f"{name}: expected a number in [0, 1] with shifts quantiles, got {getattr(self, name)}"
                    )
        if self.grad_checkpointing and not self.finetune:
            raise UsageError("grad_checkpointing: a frozen backbone keeps no gradient; expected --finetune with it")
        if self.classes > 255:
            raise UsageError(f"classes: label maps are 8-bit, expected at most 255, got {self.classes}")
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


_MODEL = re.compile(r"[\w.-]+")  # a name of timm's own list: neither a path nor a place on the network


def make_config(preset: str | None = None, **overrides) -> Config:
    """The preset's values with `overrides` on top; an unknown name is an error that lists the known ones.

    preset: None is the one that the method starts from, METHOD_PRESETS. loss_dtype follows dtype.
    """
    if preset is None:
        preset = METHOD_PRESETS.get(overrides.get("method", "hp"), "small")
    if preset not in PRESETS:
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    _require_known(overrides)
    values = {"preset": preset, **PRESETS[preset], **overrides}
    return Config(**{"loss_dtype": values.get("dtype", "fp32"), **values})


def _require_known(settings: Iterable[str]) -> None:
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
