"""`hpseg show RUN PHOTOS...`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="folder made by `hpseg train`")
    add(
        "images",
        nargs="+",
        help="photographs, folders of them, or .npy arrays uint8 (H, W, 3) or (N, H, W, 3); or one data set with "
        "labels: its name, or a folder with images/ and labels/",
    )
    add("--root", help="folder of a data set that is named")
    add("--split", default="val", help="of a data set that is named: train or val (default)")
    add("--void", type=int, default=255, help="id in labels/ that does not count (default 255)")
    add("--truth", action=argparse.BooleanOptionalAction, default=True, help="classes by the labels, too (default)")
    add("--n", type=int, default=16, help="pictures to show, spread evenly over those given (default 16)")
    add("--out", default="sheet.png", help="picture to write (default sheet.png)")
    add("--height", type=int, default=160, metavar="PIXELS", help="of every picture (default 160)")
    add("--as-classes", action="store_true", help="class ids of the data set last scored on, instead of clusters")
    add("--crf", action="store_true", help="sharpen the regions with a dense CRF")
    add("--overwrite", action="store_true", help="replace a picture of this name")
    add("--strict", action="store_true", help="stop at a picture that cannot be decoded, instead of passing it over")
    add("--device", default="auto")


def run(args: argparse.Namespace) -> None:
    from hpseg.inference.sheet import show

    show(**vars(args))
    print(args.out)
