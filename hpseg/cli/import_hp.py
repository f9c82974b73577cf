"""`hpseg import-hp FILE --out RUN`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", help="released checkpoint, a torch file")
    add("--out", required=True, help="folder for the run")
    add("--backbone", help="timm ViT in the place of the one in the checkpoint; must hold the same weights")
    add("--weights", help="local checkpoint for --backbone")
    add("--preset", choices=("cocostuff", "cityscapes", "potsdam"), help="what it was trained on (default: a guess)")
    add("--overwrite", action="store_true", help="replace the run in --out")


def run(args: argparse.Namespace) -> None:
    from hpseg.interop.released_checkpoints import import_hp

    facts = import_hp(**vars(args))
    probe = "with its linear probe" if facts["linear"] else "without a linear probe"
    codes = f"{facts['classes']} clusters of {facts['dim']}-dimensional codes"
    print(f"{args.out}: {codes} on patches of {facts['patch']} pixels, {probe}")
