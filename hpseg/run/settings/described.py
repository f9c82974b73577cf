"""What people read about settings: the sentences of the command line, and docs/settings.md.

After a change of settings or presets: `python -m hpseg.run.settings.described > docs/settings.md`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from hpseg.run.presets import METHOD_PRESETS, PRESETS
from hpseg.run.settings.methods import OF_METHOD
from hpseg.run.settings.shared import SHARED

GROUPS: tuple[type, ...] = (*SHARED, *OF_METHOD.values())  # in the order of help and documentation


def title(group: type) -> str:
    return (group.__doc__ or "").partition(":")[0].rstrip(".")


def flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def choices_of(field: dataclasses.Field) -> tuple[str, ...]:
    # A run may come from a preset that this version does not have, so that only the command line has a choice of them.
    return tuple(PRESETS) if field.name == "preset" else field.metadata["choices"]


def plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def range_text(field: dataclasses.Field) -> str:
    """The numbers that the setting may be, in words; empty where it is none, or any."""
    rules = field.metadata
    low, high = rules["low"], rules["high"]
    if rules["numbers"]:
        return "whole numbers above 0"
    if rules["above"] > -math.inf:
        return f"above {plain(rules['above'])}"
    if high == 2**63 - 1:
        return "64 bits"
    if high < math.inf:
        return f"{plain(low)} to {plain(high)}"
    return f"at least {plain(low)}" if low > -math.inf else ""


def default_text(group: type, field: dataclasses.Field) -> str:
    """What a run has that names nothing but its method: the preset that the method starts from may have its own."""
    if field.metadata["required"]:
        return "required"
    if field.name == "method":
        return plain(field.default)
    own = [method for method, settings in OF_METHOD.items() if settings is group]
    values: dict[Any, list[str]] = {}
    for method in field.metadata["methods"] or own or OF_METHOD:
        preset = METHOD_PRESETS[method]
        value = {"preset": preset, **PRESETS[preset]}.get(field.name, field.default)
        values.setdefault(value, []).append(method)
    (first, _), *others = values.items()
    return ", ".join([plain(first), *(f"{plain(value)} with {listed(methods)}" for value, methods in others)])


def help_text(group: type, field: dataclasses.Field) -> str:
    """The sentence of the command line, beside which stand the choices, but for the presets."""
    methods, default = field.metadata["methods"], default_text(group, field)
    said = [
        f"only {listed(methods)}" if methods else "",
        f"one of {', '.join(PRESETS)}" if field.name == "preset" else range_text(field),
        {"required": "required", "none": ""}.get(default, f"default {default}"),
    ]
    return f"{field.metadata['help']} ({'; '.join(filter(None, said))})".removesuffix(" ()")


PREAMBLE = """# Settings

Every setting is a flag of `hpseg train` and, with `_` for `-`, a keyword of `hpseg.train`. `--no-NAME` switches one off
that is on. `config.json` in the run folder keeps them all. What they belong to is told in [methods](methods.md).

The default is what a run has that names its method alone, as each method starts from a small preset. Another `--preset`
starts from its own values, which stand at the end of this page, and every flag overrides them.

This page is made from `hpseg/run/settings/`, by `python -m hpseg.run.settings.described > docs/settings.md`.
"""
ANY = {"bool": "on, off", "float": "any number"}


def page() -> str:
    """docs/settings.md."""
    lines = [PREAMBLE]
    for group in GROUPS:
        lines += [f"## {title(group)}", "", "| flag | default | range | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(group):
            name = field.name if field.name == "images" else flag(field)
            allowed = ", ".join(choices_of(field)) or range_text(field) or ANY.get(str(field.type), "")
            methods = field.metadata["methods"]
            text = field.metadata["help"] + (f" (only {listed(methods)})" if methods else "")
            lines.append(f"| `{name}` | {default_text(group, field)} | {allowed} | {text} |")
        lines.append("")
    lines += ["## Presets", "", "| preset | settings |", "|---|---|"]
    for preset, values in PRESETS.items():
        lines.append(f"| `{preset}` | {', '.join(f'{name} {plain(value)}' for name, value in values.items())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
