"""What the folder of a run says of it in words and numbers, without a look at a photograph or a model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpseg.data.datasets import NAMES
from hpseg.models.weights import note_on
from hpseg.reporting.curves import read_log
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.run.presets import METHOD_PRESETS, PRESETS
from hpseg.run.settings.described import GROUPS, flag, plain
from hpseg.run.settings.methods import OF_METHOD

TOLD_ELSEWHERE = ("images", "root", "method", "classes", "backbone", "device", "workers")


@dataclass(frozen=True)
class Run:
    """A run folder as read. results: of results.json, empty where the run is not finished. log: see `read_log`."""

    folder: Path
    config: Config
    results: dict[str, Any]
    log: dict[str, tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def read(folder: Path) -> Run:
        """UsageError where `folder` is no run."""
        if not (folder / "config.json").is_file():
            raise UsageError(f"run: {folder} holds no config.json; expected a folder made by `hpseg train`")
        config = Config.load(folder / "config.json")
        return Run(folder, config, read_json(folder / "results.json"), read_log(folder / "log.csv"))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def has_model(self) -> bool:
        return (self.folder / "model.safetensors").is_file()

    @property
    def steps(self) -> int:
        """Steps made, as far as the folder says."""
        logged = self.log["loss"][0] if "loss" in self.log else np.zeros(0)
        return int(self.results.get("steps", logged[-1] + 1 if len(logged) else 0))

    @property
    def seconds(self) -> float | None:
        if "seconds" in self.results:
            return float(self.results["seconds"])
        return float(self.log["seconds"][1][-1]) if "seconds" in self.log else None

    @property
    def data(self) -> str:
        """The name of the training photographs: of a data set, or of their folder, without the folders above it."""
        return self.config.images if self.config.images in NAMES else Path(self.config.images).name


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file of the run; empty where there is none, UsageError where it is something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"run: {path} cannot be read ({error}); remove it") from None
    if not isinstance(content, dict):
        raise UsageError(f"run: {path} holds a {type(content).__name__}, expected an object; remove it")
    return content


def method_title(config: Config) -> str:
    """The method's name as its paper has it, and where that appeared."""
    return (OF_METHOD[config.method].__doc__ or config.method).partition(":")[0].rstrip(".")


def kind_of(run: Run) -> str:
    """What its label maps tell apart."""
    return "classes" if run.config.learns_classes else "clusters"


def lead(run: Run) -> str:
    """The run in a sentence."""
    method, count, kind = method_title(run.config).partition(" (")[0], run.results.get("photographs"), kind_of(run)
    if not count:
        return f"{method}, {run.config.classes} {kind}."
    took = (duration(run.seconds) or "").replace(" ", "\u00a0")  # on one line
    return f"{method} sorted the patches of {count:,} photographs into {run.config.classes} {kind}, in {took}."


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, a line each: (what, in words)."""
    config, results = run.config, run.results
    backbone = results.get("backbone") or {}
    weights = backbone.get("weights") or (Path(config.weights).name if config.weights else None)
    count = results.get("photographs")
    found: list[tuple[str, str | None]] = [
        ("method", method_title(config)),
        (
            "backbone",
            ", ".join(filter(None, [config.backbone, weights, "trained too" if config.finetune else "frozen"])),
        ),
        ("hash of the weights", backbone.get("fingerprint")),
        ("photographs", f"{count:,} ({run.data})" if count else run.data),
        (kind_of(run), str(config.classes)),
        ("labels looked at", None if config.labels_used else "none in this run"),
        ("steps", f"{run.steps:,} of {config.steps:,}" if run.steps != config.steps else f"{run.steps:,}"),
        ("time", duration(run.seconds)),
        ("machine", _machine(results)),
        ("versions", ", ".join(f"{name} {results[name]}" for name in ("hpkernels", "torch") if name in results)),
        ("unreadable pictures", str(len(results["unreadable"])) if results.get("unreadable") else None),
    ]
    # What else is said of the backbone, such as a licence or what its own training saw.
    known = ("name", "weights", "fingerprint")
    found += [(name.replace("_", " "), str(value)) for name, value in backbone.items() if name not in known and value]
    return [(name, value) for name, value in found if value]


def _machine(results: dict[str, Any]) -> str | None:
    if "device" not in results:
        return None
    threads, ranks = results.get("threads"), results.get("ranks", 1)
    said = [str(results["device"])]
    said += [f"{threads} thread{'s' * (threads > 1)}"] if threads and said[0] == "cpu" else []
    return ", ".join([*said, *[f"{ranks} ranks"] * (ranks > 1)])


def duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def notes(run: Run) -> list[str]:
    """What a reader must know before anything else: whether the run is whole, and what labels it has seen."""
    said = []
    if not run.results and run.log:
        said.append(f"This run is not finished: {run.steps:,} of {run.config.steps:,} steps are logged.")
    if run.config.labels_used:
        said.append(run.config.labels_used)
    source = (run.results.get("backbone") or {}).get("weights")
    if source and (note := note_on(source)):
        said.append(note[0].upper() + note[1:] + ".")
    return said


def changed_settings(config: Config) -> list[tuple[str, str, str]]:
    """(flag, value, default) of the settings that are not what the method alone would have had. Of paths the name."""
    preset = METHOD_PRESETS.get(config.method, "small")
    start = {"preset": preset, **PRESETS[preset]}
    found = []
    for group in GROUPS:
        for field in dataclasses.fields(group):
            value, default = getattr(config, field.name), start.get(field.name, field.default)
            if field.name == "loss_dtype":
                default = config.dtype
            if field.name not in TOLD_ELSEWHERE and value != default:
                shown = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else plain(value)
                found.append((flag(field), shown, plain(default)))
    return found
