"""`hpseg pretrain PHOTOS --out FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpseg.pretraining.options import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", type=Path, help="folder of photographs, searched recursively; no labels are read")
    add("--out", type=Path, required=True, help="weights to write, ending in .safetensors")
    add("--minutes", type=float, help="train this long (default 40), unless --steps is given")
    add("--steps", type=int, help="train this many steps instead of --minutes")
    add("--batch-size", type=int, help="images per step")
    add("--procedural", type=float, help="fraction of the images drawn by hpseg.data.procedural, 0 to 1")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--width", type=int)
    add("--depth", type=int)
    add("--heads", type=int)
    add("--patch-size", type=int)
    add("--crop", type=int, help="side of the large crops in pixels, a multiple of --patch-size")
    add("--small-crops", type=int, help="crops of half that side per image")
    add("--prototypes", type=int, help="prototypes of the image term and of the patch term")
    add("--texture-weight", type=float, help="weight of the texture term; 0 switches it off")
    add("--texture-first", type=float, help="fraction of the training that has the texture term alone")
    add("--device", help="torch device")
    add("--seed", type=int)
    add("--save-every", type=float, help="seconds between saves")
    add("--resume", action="store_true", help="go on from the .state.pt beside --out")
    add("--overwrite", action="store_true", help="replace an existing --out")
    parser.set_defaults(**vars(Options()))


def run(args: argparse.Namespace) -> None:
    from hpseg.pretraining.pretrain import pretrain

    steps, seconds = pretrain(**vars(args))
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.2f} MB after {steps} steps, {seconds / 60:.1f} minutes")
