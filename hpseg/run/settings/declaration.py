"""How a setting is declared, and what its declaration allows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hpseg.run.errors import UsageError


def setting(
    text: str,
    default: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: tuple[str, ...] = (),
    numbers: bool = False,
    methods: tuple[str, ...] = (),
    basic: bool = False,
    required: bool = False,
) -> Any:
    """The field of a dataclass that is a setting.

    text: what it means, for --help-all and the documentation. low, high: it may have these values; above: not this one.
    numbers: whole numbers above 0 with commas between, read by `numbers_of`. methods: those that look at a shared
    setting, if not all do. basic: also part of the short --help. required: has no default on the command line.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": text,
            "low": low,
            "high": high,
            "above": above,
            "choices": choices,
            "numbers": numbers,
            "methods": methods,
            "basic": basic,
            "required": required,
        },
    )


def numbers_of(value: str) -> list[int]:
    """The numbers of a setting as "1,2,4"; ValueError for anything else."""
    numbers = [int(part) for part in value.split(",")]
    if min(numbers) < 1:
        raise ValueError(value)
    return numbers


_KINDS = {"int": int, "float": float, "str": str, "bool": bool, "str | None": str | None}


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value, as a float where one is declared; UsageError where it is not what the declaration allows."""
    kind, rules, given = str(field.type), field.metadata, value
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool) != (kind == "bool"):
        raise UsageError(f"{field.name}: expected {kind}, got {value!r}")
    if kind in ("int", "float"):
        low, high = rules["low"], rules["high"]
        bounded = (low, high) != (-math.inf, math.inf)
        if bounded and not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"a number in [{low}, {high}]"
            raise UsageError(f"{field.name}: expected {expected}, got {given}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{field.name}: expected a finite number, got {value}")
        if not value > rules["above"]:
            raise UsageError(f"{field.name}: expected a number above {rules['above']}, got {value}")
    if rules["numbers"]:
        try:
            numbers_of(value)
        except ValueError:
            raise UsageError(f"{field.name}: expected numbers as {field.default!r}, got {value!r}") from None
    if rules["choices"] and value not in rules["choices"]:
        raise UsageError(f"{field.name}: expected one of {', '.join(rules['choices'])}, got {value!r}")
    return value
