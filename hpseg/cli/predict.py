"""`hpseg predict RUN PHOTOS... --out FOLDER`."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="folder made by `hpseg train`")
    add("images", nargs="+", help="photographs, folders of them, or .npy arrays uint8 (H, W, 3) or (N, H, W, 3)")
    add("--out", required=True, help="folder for the label maps, each at its picture's size")
    add("--format", default="png", choices=("png", "npy"), help="palette PNG (default) or array uint8 (H, W)")
    add("--overlay", type=float, metavar="ALPHA", help="also write overlays of this opacity, 0 to 1")
    add("--legend", action=argparse.BooleanOptionalAction, default=True, help="below every overlay (default)")
    add("--as-classes", action="store_true", help="class ids of the data set last scored on, instead of clusters")
    add("--size", type=int, metavar="PIXELS", help="short side at prediction (default: the run's)")
    add(
        "--window",
        type=int,
        metavar="PIXELS",
        help="side of a sliding window (default: one for a picture of usual size)",
    )
    add("--stride", type=int, metavar="PIXELS", help="from window to window (default: half a window)")
    add("--crf", action="store_true", help="sharpen the regions with a dense CRF")
    add("--overwrite", action="store_true", help="replace label maps that are already in --out")
    add("--strict", action="store_true", help="stop at a picture that cannot be decoded, instead of passing it over")
    add("--device", default="auto")


def run(args: argparse.Namespace) -> None:
    from hpseg.inference.predict_files import predict_files

    settings = vars(args)
    skipped = predict_files(overlay_alpha=settings.pop("overlay"), **settings)
    if skipped:
        print(f"{len(skipped)} unreadable pictures were skipped", file=sys.stderr)
