"""`hpseg probe RUN DATA`."""

from __future__ import annotations

import argparse

from hpseg.runtime.messages import waiting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="folder made by `hpseg train`")
    add("data", help="name of a data set, or a folder with images/ and labels/ to fit to")
    add("--root", help="folder of the named data set")
    add("--score-on", help="folder with images/ and labels/ to score on, with a folder as data")
    add("--void", type=int, default=255, help="label id that does not count (default 255)")
    add("--protocol", default="default", choices=("default", "stego"), help="how pictures are brought to size")
    add("--steps", type=int, default=1000, help="optimiser steps (default 1000)")
    add("--batch-size", type=int, default=16, help="pictures per step (default 16)")
    add("--lr", type=float, default=1e-3, help="of the linear probe (default 1e-3)")
    add("--cluster-lr", type=float, default=5e-3, help="of the cluster probe (default 5e-3)")
    add("--seed", type=int, default=0)
    add("--strict", action="store_true", help="stop at a picture that cannot be decoded, instead of passing it over")
    add("--device", default="auto")


def run(args: argparse.Namespace) -> None:
    with waiting("loading"):
        from hpseg.evaluation.evaluate import format_table
        from hpseg.evaluation.probes import probe

    print(format_table(probe(**vars(args))))
