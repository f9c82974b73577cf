"""The run folder: config.json, model.safetensors, state.pt, log.csv, results.json.

Every file is written under a temporary name, flushed to the disk and renamed, so a run killed at any moment leaves
either the old file or the new one. `state.pt` alone is enough to resume; `model.safetensors` is what prediction reads.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hpseg.config import MACHINE_FIELDS, Config, UsageError

RUN_FILES = ("config.json", "model.safetensors", "state.pt", "log.csv", "results.json")


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def open_run(out: Path, config: Config, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Prepares the folder `out`. Returns the saved state to go on from, or None for a fresh start.

    A folder with anything in it is an error unless `resume` or `overwrite` is set; `overwrite` removes the files of the
    old run and nothing else. Resuming with settings that change the result is an error that names the first of them.
    """
    if resume and overwrite:
        raise UsageError("resume, overwrite: expected at most one of the two")
    if out.exists() and not out.is_dir():
        raise UsageError(f"out: {out} is a file, expected a folder")
    if resume and (out / "config.json").is_file():
        saved = Config.load(out / "config.json")
        for name, value in vars(saved).items():
            if name not in MACHINE_FIELDS and getattr(config, name) != value:
                raise UsageError(
                    f"{name}: {out} was started with {value!r}, got {getattr(config, name)!r}; "
                    "resume with the same settings, or start anew with overwrite"
                )
        return load_state(out / "state.pt") if (out / "state.pt").is_file() else None
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        held = ", ".join(sorted(path.name for path in out.iterdir())[:4])
        raise UsageError(
            f"out: {out} is not empty (it holds {held}); pass --resume to go on with a run, --overwrite to "
            "replace it, or another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    write_json(out / "config.json", vars(config))
    return None


def save_state(out: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and containers of them: all that `weights_only=True` will load again."""
    temporary = out / ".state.pt.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out / "state.pt")


def load_state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def save_model(out: Path, tensors: dict[str, Tensor], fingerprint: str) -> None:
    """Trained parts only; the frozen backbone is kept as a name and the fingerprint of its weights."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(out / "model.safetensors", save(content, metadata={"backbone_fingerprint": fingerprint}))


def load_model(run: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name and the backbone fingerprint they were trained on."""
    from safetensors import safe_open

    path = run / "model.safetensors"
    if not path.is_file():
        raise UsageError(f"run: {run} holds no model.safetensors; expected a folder made by `hpseg train`")
    with safe_open(path, "pt") as file:
        fingerprint = (file.metadata() or {}).get("backbone_fingerprint", "")
    return load_file(path), fingerprint


class Log:
    """log.csv: one row per step; rows past the resumed step are dropped when it is opened."""

    def __init__(self, path: Path, resumed_step: int, terms: tuple[str, ...]):
        rows = []
        if resumed_step and path.is_file():
            with open(path, newline="") as file:
                rows = [
                    row
                    for row in csv.DictReader(file)
                    if (row["step"] or "").isdigit() and int(row["step"]) < resumed_step
                ]
        fields = ("step", "loss", *terms, "lambda", "grad_norm", "images_per_s", "seconds")
        self._file = open(path.with_name(".log.csv.tmp"), "w", newline="")
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
