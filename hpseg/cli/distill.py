"""`hpseg distill PHOTOS --teacher NAME --out FILE`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from hpseg.pretraining.options import DTYPES, DistillOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", type=Path, help="folder of photographs, searched recursively; no labels are read")
    add("--teacher", required=True, help="any network of timm, such as vit_small_patch16_dinov3.lvd1689m, or a file")
    add("--teacher-weights", type=Path, metavar="FILE", help="local file with the teacher's weights")
    add(
        "--levels",
        metavar="STRIDE:WEIGHT,...",
        help="stages of a convolutional teacher by stride, such as 16:0.5,32 (default: the deepest)",
    )
    add("--out", type=Path, required=True, help="weights to write, ending in .safetensors")
    add(
        "--student",
        help="vit_tiny8; hybrid_tiny8, which begins with stages of a convolutional teacher; or any ViT of timm, which "
        "starts from random weights (default vit_tiny8)",
    )
    add("--minutes", type=float, help="train this long, unless --steps is given (default %(default)s)")
    add("--steps", type=int, help="train this many steps instead of --minutes")
    add("--batch-size", type=int, help="crops of the first of --sides a step; of others as many as have as many pixels")
    add("--sides", type=int, nargs="+", help="of the student's crops in pixels; a step draws one of them")
    add("--teacher-scale", type=float, help="side of the teacher's crops, in those of the student (default 2)")
    add("--mix", type=float, help="probability that a crop gets a box of another one, as in CutMix (default 0.3)")
    add("--lr", type=float, help="peak learning rate of AdamW (default %(default)s)")
    add("--dtype", choices=DTYPES, help="arithmetic of teacher and student; bf16 is faster where the processor has it")
    add("--device", help="torch device")
    add("--seed", type=int)
    add("--save-every", type=float, metavar="SECONDS", help="time between saves")
    add(
        "--note",
        help="what whoever reads results must know of the weights; stands in results.json of every run on them",
    )
    add("--resume", action="store_true", help="go on from the .state.pt beside --out")
    add("--overwrite", action="store_true", help="replace an existing --out")
    defaults = {field.name: field.default for field in fields(DistillOptions) if field.name != "teacher"}
    parser.set_defaults(**defaults)


def run(args: argparse.Namespace) -> None:
    from hpseg.pretraining.distill import distill

    steps, seconds = distill(**vars(args))
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.2f} MB after {steps} steps, {seconds / 60:.1f} minutes")
