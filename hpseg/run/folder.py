"""The run folder: config.json, model.safetensors, state.pt, log.csv, results.json, .lock, preview/ and tensorboard/.

What eval and probe found is in eval.json, labels.json, baselines.safetensors, probe.json and probe.safetensors, the
page about it all in report.html; backbone.safetensors belongs to an imported run, auxiliary.safetensors and
label_quality.json to one of method lookbeyond.

Every file is written under a temporary name, flushed to the disk and renamed, so a run killed at any moment leaves
either the old file or the new one. `state.pt` alone is enough to resume; `model.safetensors` is what prediction reads.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hpseg.run.config import MACHINE_FIELDS, Config
from hpseg.run.errors import UsageError
from hpseg.run.files import LOCK, RunLock, read_torch, remove_temporaries, require_folder, write_atomically, write_torch

REPORT = "report.html"
RUN_FILES = (
    *("config.json", "model.safetensors", "state.pt", "log.csv", "results.json", "backbone.safetensors"),
    *("auxiliary.safetensors", "label_quality.json"),
    # Of the old model, and wrong for the new one:
    *("eval.json", "labels.json", "probe.json", "probe.safetensors", "baselines.safetensors", REPORT),
)
PREVIEWS, TENSORBOARD, EVENTS_SUFFIX = "preview", "tensorboard", ".hpseg"
# What a run writes into folders of its own, by the patterns of pathlib; other files there are not the run's.
RUN_PATTERNS = {
    PREVIEWS: f"step_{'[0-9]' * 6}.png",
    TENSORBOARD: f"events.out.tfevents.*{EVENTS_SUFFIX}",
}


def open_run(out: Path, config: Config, resume: bool, overwrite: bool, lock: RunLock) -> dict[str, Any] | None:
    """Prepares the folder `out`. Returns the saved state to go on from, or None for a fresh start. `lock` is acquired
    as soon as there is a folder, before anything in it is changed.

    A folder with anything in it is an error unless `resume` or `overwrite` is set, see `begin_run`. Resuming with
    settings that change the result is an error that names the first of them.
    """
    if resume and overwrite:
        raise UsageError("resume, overwrite: expected at most one of the two")
    _require_run_folder(out)
    if resume and (out / "config.json").is_file():
        lock.acquire()
        remove_temporaries(_folders(out), own=True)
        resumed(out, config, vars(config))
        return load_state(out / "state.pt") if (out / "state.pt").is_file() else None
    ways = "it has no config.json to go on from; pass" if resume else "pass --resume to go on with a run,"
    begin_run(out, config, overwrite, lock, ways)
    return None


def resumed(out: Path, config: Config, given: Collection[str]) -> Config:
    """The settings of the run in `out`, if there is one, with those of `config` that may differ.

    given: names of the settings in `config` that were asked for. UsageError for one that decides the result and is not
    what the run was started with.
    """
    if not (out / "config.json").is_file():
        return config
    saved = Config.load(out / "config.json")
    for name, value in vars(saved).items():
        if name in given and name not in MACHINE_FIELDS and getattr(config, name) != value:
            what = f"{name} (of all ranks together)" if name == "batch_size" else name
            raise UsageError(
                f"{what}: {out} was started with {value!r}, got {getattr(config, name)!r}; resume with the same "
                "settings, or start anew with overwrite"
            )
    return dataclasses.replace(saved, **{name: getattr(config, name) for name in MACHINE_FIELDS})


def begin_run(out: Path, config: Config, overwrite: bool, lock: RunLock, ways: str = "pass") -> None:
    """Makes `out` the folder of a new run, of which it holds the settings. `lock` is acquired before anything in it is
    changed.

    A folder with anything in it is an error unless `overwrite` is set, which removes the files of the old run and
    nothing else. ways: begin the sentence on what else to do.
    """
    _require_run_folder(out)
    for locked in (False, True):  # a folder that is none of ours gets no lock file
        if locked:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        held = sorted({path.name for path in out.iterdir()} - {LOCK}) if out.is_dir() else []
        if held and not overwrite:
            raise UsageError(
                f"out: {out} is not empty (it holds {', '.join(held[:4])}); {ways} --overwrite to replace it, or "
                "another folder"
            )
    _remove_run(out)
    config.save(out / "config.json")


def _folders(out: Path) -> list[Path]:
    """Where a run writes."""
    return [out, *(out / name for name in RUN_PATTERNS)]


def _require_run_folder(out: Path) -> None:
    """UsageError where what is there now would keep a run from writing."""
    for folder in _folders(out):
        require_folder("out", folder)
    for name in RUN_FILES:
        if (out / name).is_dir():
            raise UsageError(f"out: {out / name} is a folder, expected a file of the run, or none")


def _remove_run(out: Path) -> None:
    """Removes what a run wrote into `out`, and its own folders if nothing else is in them."""
    remove_temporaries(_folders(out), own=True)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    for name, pattern in RUN_PATTERNS.items():
        folder = out / name
        for path in folder.glob(pattern):
            path.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def save_state(out: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and containers of them: all that `weights_only=True` will load again."""
    write_torch(out / "state.pt", state)


def load_state(path: Path) -> dict[str, Any]:
    return read_torch("resume", path, "; start anew with --overwrite")


@contextmanager
def explaining_state(path: Path) -> Iterator[None]:
    """Inside, a state, read from `path`, that is not what this version saves of such a run is a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(
            f"resume: {path} is not of a run with these settings ({reason}); start anew with --overwrite"
        ) from None


def save_model(out: Path, tensors: dict[str, Tensor], fingerprint: str) -> None:
    """Trained parts only; a frozen backbone is kept as a name. fingerprint: of the weights of the one that predicts."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(out / "model.safetensors", save(content, metadata={"backbone_fingerprint": fingerprint}))


def load_model(run: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name and the backbone fingerprint they were trained on."""
    path = run / "model.safetensors"
    if not path.is_file():
        raise UsageError(f"run: {run} holds no model.safetensors; expected a folder made by `hpseg train`")
    tensors, metadata = load_tensors(path)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"run: {path}: expected finite numbers, found NaN or infinity in {broken[0]}")
    return tensors, metadata.get("backbone_fingerprint", "")


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file of a run."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"run: {path} is damaged or no safetensors file ({error})") from None


class Log:
    """log.csv: one row per step; rows past the resumed step are dropped when it is opened.

    `extra` columns come after the fixed ones. Columns of the resumed file that are not asked for any more stay, empty.
    """

    def __init__(self, path: Path, resumed_step: int, terms: tuple[str, ...], extra: Sequence[str] = ()):
        rows, held = [], []
        if resumed_step and path.is_file():
            with open(path, newline="") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < resumed_step]
                held = reader.fieldnames or []
        fixed = ("step", "loss", *terms, "lambda", "grad_norm", "images_per_s", "seconds")
        fields = tuple(dict.fromkeys((*fixed, *held, *extra)))
        self._file = open(path.with_name(".log.csv.tmp"), "w", newline="")  # noqa: SIM115 (open as long as the run)
        self._writer = csv.DictWriter(self._file, fields, restval="", extrasaction="ignore")
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._file.flush()
        os.replace(path.with_name(".log.csv.tmp"), path)

    def write(self, row: dict[str, Any]) -> None:
        self._writer.writerow(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        )

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
