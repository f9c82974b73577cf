"""Argument checks shared by the public functions: every message names the argument, its value and what was expected."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of temperatures, weights and the like: so far inside fp32's range that no product of a few of them leaves it.
SMALLEST, LARGEST = 1e-9, 1e9


def describe(x: object) -> str:
    """Short text for an error message: shape, dtype and device of a tensor, `repr` of anything else."""
    if not isinstance(x, Tensor):
        return repr(x)
    dtype, layout = (str(name).removeprefix("torch.") for name in (x.dtype, x.layout))
    if x.is_nested:
        return f"a nested {dtype} tensor on {x.device}"
    dense = "" if x.layout == torch.strided else f"{layout} "
    return f"a {dense}{dtype} tensor of shape {tuple(x.shape)} on {x.device}"


def check_dense(name: str, x: Tensor) -> None:
    """Raise unless all numbers of `x` lie in memory as its strides say: no sparse, nested or opaque tensor."""
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {describe(x)}")


def check_float_tensor(name: str, x: object, *, ndim: int | tuple[int, ...] = 2, like: Tensor | None = None) -> None:
    """Raise unless `x` is a floating-point tensor with one of the given ranks (on `like`'s device if given)."""
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    check_dense(name, x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {describe(x)}")
    if x.ndim not in ranks:
        wanted = " or ".join(str(rank) for rank in ranks)
        raise ValueError(f"{name}: expected {wanted} dimensions, got {describe(x)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {describe(x)}")


def check_int_tensor(name: str, x: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """x, or the error that says why it is no tensor of integers of that shape on that device. Bools are 0 and 1."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.is_quantized:
        raise TypeError(f"{name}: expected an integer tensor, got {describe(x)}")
    check_dense(name, x)
    if x.shape != shape or x.device != device:
        raise ValueError(f"{name}: expected shape {tuple(shape)} on {device}, got {describe(x)}")
    return x


def check_ignore_index(value: object) -> int | None:
    """The label that takes no part, None where each does, or the error that says why it is no label."""
    value = plain(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"ignore_index: expected an int or None, got {describe(value)}")
    return None if value is None else check_int("ignore_index", value)


def takes_part(labels: Tensor, ignore_index: int | None) -> Tensor:
    """bool: which labels are not ignore_index, as numbers. torch compares in the labels' dtype, where -1 is 255 too."""
    if labels.dtype == torch.bool:
        labels = labels.to(torch.uint8)
    range_of = torch.iinfo(labels.dtype)
    if ignore_index is None or not range_of.min <= ignore_index <= range_of.max:
        return torch.ones_like(labels, dtype=torch.bool)
    return labels != ignore_index


def check_columns(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both matrices hold vectors of the same length."""
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(f"{name}: expected vectors of length {other.shape[-1]} as in {other_name}, got {describe(x)}")


def plain(value: object) -> Any:
    """A numpy scalar as a number of Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_positive(name: str, value: object) -> float:
    """Raise unless `value` is a number from SMALLEST to LARGEST; return it as a float."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a Python number > 0, got {describe(value)}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected a number from {SMALLEST:g} to {LARGEST:g}, got {value}")
    return float(value)


def check_int(name: str, value: object, least: int = -(2**63)) -> int:
    """Raise unless `value` is an int of at least that size, and of 64 bits; return it."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    return value


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def check_rate(name: str, value: object) -> float:
    """Raise unless `value` is a number in [0, 1]; return it as a float."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a Python number in [0, 1], got {describe(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_finite(name: str, x: Tensor, most: float = float("inf")) -> None:
    """Raise ValueError when `x` holds NaN, infinity or a number beyond `most` in size.

    On the CPU always; elsewhere, where looking would synchronise the device, only with HPKERNELS_CHECK=1 (there the
    losses answer NaN instead).
    """
    if not _looked_at(x):
        return
    low, high = torch.aminmax(x.detach())
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name}: expected finite numbers, got {bad} NaN or infinite of {x.numel()} in {describe(x)}")
    largest = torch.maximum(-low, high)
    if largest > most:
        raise ValueError(f"{name}: expected numbers of at most {most:g} in size, got {float(largest):g}")


def check_no_nan(name: str, x: Tensor) -> None:
    """The same of NaN alone."""
    if _looked_at(x) and x.isnan().any():
        raise ValueError(f"{name}: expected no NaN, got {int(x.isnan().sum())} of {x.numel()} in {describe(x)}")


def _looked_at(x: Tensor) -> bool:
    return x.numel() > 0 and (x.device.type == "cpu" or os.environ.get("HPKERNELS_CHECK") == "1")


@torch.library.custom_op("hpkernels::check_finite", mutates_args=())
def check_finite_op(x: Tensor, name: str, most: float) -> Tensor:
    """check_finite as an op, for functions that are not one."""
    check_finite(name, x, most)
    return x.new_empty(0)


@torch.library.custom_op("hpkernels::check_number", mutates_args=())
def check_number_op(x: Tensor, name: str, least: float, most: float) -> Tensor:
    """Raise unless the 0-dim `x` is from `least` to `most`."""
    if not least <= float(x) <= most:
        raise ValueError(f"{name}: expected a finite number from {least:g} to {most:g}, got {float(x):g}")
    return x.new_empty(0)


@check_finite_op.register_fake
def _(x, name, most):
    return x.new_empty(0)


@check_number_op.register_fake
def _(x, name, least, most):
    return x.new_empty(0)


def look_finite(name: str, x: Tensor, most: float = float("inf")) -> None:
    """check_finite outside of an op; nothing in what torch.compile makes."""
    if not torch.compiler.is_compiling():
        check_finite_op(x.detach(), name, most)


def look_number(name: str, x: Tensor, least: float, most: float) -> None:
    """check_number_op outside of an op, where x lies on the CPU; nothing in what torch.compile makes."""
    if x.is_cpu and not torch.compiler.is_compiling():
        check_number_op(x.detach(), name, least, most)


def poison(*witnesses: Tensor) -> Tensor:
    """0, or NaN when one of the numbers is NaN or infinite, which comparisons and unused rows would hide; no wait.

    A few numbers of each row are enough: those of which one is NaN where anything in the row was bad. A unit row is
    NaN throughout then (ops/normalize), so `witness` takes one of its numbers.
    """
    return (torch.cat([numbers.detach().flatten() for numbers in witnesses]) * 0.0).sum().float()


def witness(unit: Tensor) -> Tensor:
    """A number of each unit row, for `poison`; a view."""
    return unit[..., :1]


def extremes(x: Tensor) -> Tensor:
    """The least and the largest number of x (..., D), for `poison`, where no unit rows are made of it."""
    if x.numel() == 0:
        return x.new_zeros(0)
    return torch.stack(torch.aminmax(x.detach()))
