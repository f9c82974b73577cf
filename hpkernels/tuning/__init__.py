"""Which tile configuration, which route and which backend a shape takes on a GPU: tables per family, nearest key.

A table is JSON: {"family": ..., "entries": [{"op", "dtype", "d", "log2_n", "measured", "config"}, ...]}.

    op        name of a choice, e.g. "contrastive_grad" (config {"route": ...}), "contrastive_grad_fused" (a tile) or
              "backend/contrastive_grad/dense" (config {"backend": ...}: the faster one, where several can run)
    dtype     "half" (bf16 and fp16) or "single" (fp32)
    d         the widest rows the entry serves; null: any. The narrowest entry that is wide enough is taken.
    log2_n    the binary logarithm of the number of rows it was made for; null: any. The nearest is taken.
    measured  the day a GPU of the family ran it, or true; false: a tile is only proven to compile without spills, and
              of backends the faster one is predicted
    ms        milliseconds by backend behind such a prediction or measurement; nothing reads them but people

Searched in this order, entry by entry: the file that the environment variable HPKERNELS_TUNING names (written by
`python -m hpkernels.tune`), the table of the GPU's family, `default.json`. N itself is never part of a key, so that
batches of similar size share compiled kernels. Tables are read once a process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
_forced: dict[str, dict] = {}
FAMILIES = {(9, 0): "hopper"}  # compute capability of NVIDIA GPUs -> table; others take the default
AMD_FAMILY = "cdna"  # whatever the capability: AMD GPUs number theirs their own way


def dtype_class(dtype: torch.dtype) -> str:
    """Key of the tables: "half" (bf16 and fp16) or "single" (fp32), whose tiles are smaller."""
    return "single" if dtype == torch.float32 else "half"


def family(device: torch.device) -> str:
    """Name of the table for a device; "default" for GPUs that have none and for CPU tensors under the interpreter."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return AMD_FAMILY
    return FAMILIES.get(torch.cuda.get_device_capability(device), "default")


def lookup(op: str, dtype: torch.dtype, d: int, n: int, device: torch.device) -> dict:
    """The configuration of `op` for n rows of width d. A dict of its own; KeyError if no table serves it."""
    entry = find(op, dtype, d, n, device)
    if entry is None:
        raise KeyError(f"no tuning table serves {op} for {dtype_class(dtype)}, D = {d}")
    return dict(entry["config"])


def find(op: str, dtype: torch.dtype, d: int, n: int, device: torch.device) -> dict | None:
    """The entry that serves `op` for n rows of width d, if there is one; not to be changed."""
    if op in _forced:
        return {"op": op, "measured": False, "config": _forced[op]}
    log2_n = max(1, n).bit_length() - 1
    return _nearest(op, dtype_class(dtype), d, log2_n, family(device), os.environ.get("HPKERNELS_TUNING"))


@functools.cache
def _nearest(op: str, kind: str, d: int, log2_n: int, family: str, user_file: str | None) -> dict | None:
    files = [Path(user_file)] if user_file else []
    for file in [*files, FOLDER / f"{family}.json", FOLDER / "default.json"]:
        serving = [
            entry for entry in entries(file)
            if (entry["op"], entry["dtype"]) == (op, kind) and (entry["d"] is None or d <= entry["d"])
        ]  # fmt: skip
        if serving:
            return min(serving, key=lambda entry: _distance(entry, log2_n))
    return None


@contextlib.contextmanager
def forced(op: str, config: dict) -> Iterator[None]:
    """Within the context `op` takes this configuration, for the tuner and for tests."""
    before = _forced.get(op)
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]
        if before is not None:
            _forced[op] = before


def forget() -> None:
    """Reads the tables again at the next lookup."""
    _nearest.cache_clear()
    entries.cache_clear()


def _distance(entry: dict, log2_n: int) -> tuple[float, int]:
    wide = float("inf") if entry["d"] is None else entry["d"]
    return wide, 0 if entry["log2_n"] is None else abs(entry["log2_n"] - log2_n)


@functools.cache
def entries(file: Path) -> list[dict]:
    """The entries of a table. ValueError, naming the file, if it is not one."""
    try:
        return json.loads(file.read_text())["entries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"HPKERNELS_TUNING: expected a table of hpkernels.tune, got {file} ({error})") from None
