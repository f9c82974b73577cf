"""`hpseg train PHOTOS --out RUN --classes K`; every field of hpseg.run.config.Config is a flag."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from hpseg.cli.report import add_no_report, leave_page
from hpseg.run.settings.described import GROUPS, choices_of, flag, help_text, title
from hpseg.run.settings.shared import RunSettings
from hpseg.runtime.messages import waiting

KINDS = {"int": int, "float": float}
METAVARS = {"preset": "NAME"}  # of more choices than a line holds
OVER_PRESETS = "Flags override the preset; a larger --preset has defaults of its own."


def add_setting_flags(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = ("images",)
) -> dict[argparse.Action, dataclasses.Field]:
    """A flag per setting, in groups; one that is not given leaves the preset's value. Returns which is which."""
    flags: dict[argparse.Action, dataclasses.Field] = {}
    for settings in GROUPS:
        group = parser.add_argument_group(title(settings))
        for field in dataclasses.fields(settings):
            if field.name in leave_out:
                continue
            choices = choices_of(field) or None
            options: dict[str, Any] = dict(
                type=KINDS.get(str(field.type), str),
                choices=choices,
                required=field.metadata["required"],
                metavar=METAVARS.get(field.name) if choices else str(field.type).split()[0].upper(),
            )
            if field.type == "bool":
                options = dict(action=argparse.BooleanOptionalAction)
            text = help_text(settings, field)
            flags[group.add_argument(flag(field), default=argparse.SUPPRESS, help=text, **options)] = field
    return flags


class HelpAll(argparse.Action):
    """Shows the flags that the short help leaves out, too."""

    def __init__(self, option_strings, dest, hidden, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.hidden: dict[argparse.Action, str | None] = hidden

    def __call__(self, parser, namespace, values, option_string=None):
        for action, text in self.hidden.items():
            action.help = text
        parser.epilog = OVER_PRESETS
        parser.print_help()
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s PHOTOS --out RUN --classes K [--resume | --overwrite] [SETTING ...]"
    parser.epilog = f"{OVER_PRESETS} `hpseg train --help-all` shows every setting."
    hidden: dict[argparse.Action, str | None] = {}
    parser.add_argument("--help-all", action=HelpAll, hidden=hidden, help="show every setting and exit")
    parser.add_argument("images", help=RunSettings.__dataclass_fields__["images"].metadata["help"])
    parser.add_argument("--out", required=True, help="folder for the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_no_report(parser)
    for action, field in add_setting_flags(parser).items():
        if not field.metadata["basic"]:
            hidden[action], action.help = action.help, argparse.SUPPRESS


def run(args: argparse.Namespace) -> None:
    with waiting("loading"):
        from hpseg.training.loop import train

    page = vars(args).pop("report")
    train(**vars(args))
    if page:
        leave_page(args.out, device=vars(args).get("device", "auto"))
