"""Argument checks shared by the public functions: every message names the argument, its value and what was expected."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x: object) -> str:
    """Short text for an error message: shape, dtype and device of a tensor, `repr` of anything else."""
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"
    return repr(x)


def check_float_tensor(name: str, x: object, *, ndim: int | tuple[int, ...] = 2, like: Tensor | None = None) -> None:
    """Raise unless `x` is a floating-point tensor with one of the given ranks (on `like`'s device if given)."""
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {describe(x)}")
    if x.ndim not in ranks:
        wanted = " or ".join(str(rank) for rank in ranks)
        raise ValueError(f"{name}: expected {wanted} dimensions, got {describe(x)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {describe(x)}")


def check_columns(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both matrices hold vectors of the same length."""
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name}: expected vectors of length {other.shape[-1]} as in {other_name}, got {describe(x)}"
        )


def check_positive(name: str, value: object) -> float:
    """Raise unless `value` is a finite number above zero; return it as a float."""
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a Python number > 0, got {describe(value)}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return float(value)


def check_rate(name: str, value: object) -> float:
    """Raise unless `value` is a number in [0, 1]; return it as a float."""
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a Python number in [0, 1], got {describe(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError when `x` holds NaN or infinity. On the CPU always; elsewhere, where looking would
    synchronise the device, only with HPKERNELS_CHECK=1 (there the losses answer NaN instead)."""
    if x.numel() == 0 or (x.device.type != "cpu" and os.environ.get("HPKERNELS_CHECK") != "1"):
        return
    low, high = torch.aminmax(x.detach())
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name}: expected finite numbers, got {bad} NaN or infinite of {x.numel()} in {describe(x)}")
