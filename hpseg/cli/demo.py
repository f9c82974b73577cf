"""`hpseg demo`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, help="folder to write (default: demo, or the first free of demo-2, demo-3, ...)")
    add("--overwrite", action="store_true", help="write into a non-empty --out")
    add("--seeds", type=int, default=3, help="independent repetitions: mosaics, training and k-means (default 3)")
    add("--steps", type=int, default=200, help="training steps of each run (default 200)")
    add("--train-images", type=int, default=64, help="mosaics to train on, per seed")
    add("--test-images", type=int, default=24, help="mosaics to score on, per seed")
    add(
        "--backbone",
        default="embedded",
        help="'embedded', 'embedded-selfsup' or any timm ViT, such as vit_small_patch8_224.dino",
    )
    add("--weights", type=Path, help="local checkpoint for the backbone")
    add("--device", default="auto")


def run(args: argparse.Namespace) -> None:
    from hpseg.demo import demo, table

    out, results = demo(**vars(args), news=partial(print, flush=True))
    print(table(results))
    print(f"{results['seconds']:.0f} seconds; pictures, results and runs are in {out}")
