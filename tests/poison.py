"""Fresh memory full of NaN, torch's and the CPU extension's own: reads of what nobody wrote show."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch

from hpkernels import dispatch

_scratch = False  # what the extension was told last: it cannot be asked


def is_on() -> bool:
    """Whether fresh memory of both is filled now."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and torch.utils.deterministic.fill_uninitialized_memory
        and _scratch
    )


def _fill(torchs: bool, scratch: bool, warn_only: bool = True) -> None:
    global _scratch
    torch.use_deterministic_algorithms(torchs, warn_only=warn_only)  # under which torch.empty is filled
    if dispatch.MISSING["cpu"] is None:
        importlib.import_module("hpkernels._cpu").poison_memory(scratch)
    _scratch = scratch


def fill() -> None:
    """From now on."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    _fill(True, True)


@contextlib.contextmanager
def filled(on: bool = True) -> Iterator[None]:
    """For a while, or not for a while; afterwards as before."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        _scratch,
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    _fill(on, on)
    try:
        yield
    finally:
        _fill(*before)
