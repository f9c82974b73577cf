"""The command line: `hpseg train | predict | eval | probe | demo | pretrain`. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from hpseg.config import CHOICES, PRESETS, Config, UsageError

VERBS = {
    "train": "find classes in a folder of photographs, without labels",
    "predict": "write a label map for each photograph",
    "eval": "score a run against labels, beside k-means on the same frozen features",
    "probe": "fit a linear and a cluster probe to labels, on the frozen codes of a run",
    "demo": "train on the photographs in this package and show the result; needs no network",
    "pretrain": "train a small ViT on your own photographs, without labels",
}
HELP = {
    "classes": "clusters to find",
    "backbone": "'embedded' or any timm ViT, such as vit_small_patch8_224.dino",
    "root": "folder of the named data set",
    "weights": "local checkpoint for the backbone (timm or DINO key names)",
    "preset": "settings to start from",
    "size": "side of the square training crop in pixels",
    "crop": "which part of a photograph is trained on",
    "predict_size": "short side at prediction in pixels",
    "cache_features": "run the frozen backbone once per photograph",
    "workers": "data loading processes, -1 picks",
    "steps": "optimiser steps",
    "batch_size": "photographs per step",
    "dim": "width of the segmentation code",
    "lr": "learning rate of the segmentation head",
    "clusters": "final centroids: as trained, or k-means over the training codes",
}


def add_setting_flags(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ("images",)) -> None:
    """A flag per field of Config; a flag that is not given leaves the preset's value."""
    for field in dataclasses.fields(Config):
        if field.name in leave_out:
            continue
        flag, text = "--" + field.name.replace("_", "-"), HELP.get(field.name)
        if field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        choices = tuple(PRESETS) if field.name == "preset" else CHOICES.get(field.name)
        kind = {"int": int, "float": float}.get(str(field.type), str)
        parser.add_argument(
            flag,
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            help=text,
            required=field.name == "classes",
            metavar=None if choices else str(field.type).split()[0].upper(),
        )


def add_arguments(verb: str, parser: argparse.ArgumentParser) -> None:
    if verb == "train":
        parser.add_argument("images", help="folder of photographs, searched recursively, or the name of a data set")
        parser.add_argument("--out", required=True, help="folder for the run")
        parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
        parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
        add_setting_flags(parser)
    elif verb == "predict":
        parser.add_argument("run", help="folder made by `hpseg train`")
        parser.add_argument("images", nargs="+", help="photographs, or folders of them")
        parser.add_argument(
            "--out", required=True, help="folder for the label maps (palette PNG, each at its image's size)"
        )
        parser.add_argument(
            "--overlay", type=float, metavar="ALPHA", help="also write overlays of this opacity, 0 to 1"
        )
        parser.add_argument("--crf", action="store_true", help="sharpen the regions with a dense CRF")
        parser.add_argument("--device", default="auto")
    elif verb == "eval":
        parser.add_argument("run", help="folder made by `hpseg train`")
        parser.add_argument("data", help="name of a data set, or a folder with images/ and labels/, paired by stem")
        parser.add_argument("--root", help="folder of the named data set")
        parser.add_argument("--split", default="val", help="of the named data set: train or val (default val)")
        parser.add_argument(
            "--fit-on", metavar="PHOTOS", help="photographs k-means is fitted to (default: the run's own)"
        )
        parser.add_argument("--void", type=int, default=255, help="label id that does not count (default 255)")
        parser.add_argument("--rgb", action="store_true", help="add k-means on colours as a second baseline")
        parser.add_argument(
            "--protocol", default="default", choices=("default", "stego"), help="how pictures are brought to size"
        )
        parser.add_argument(
            "--flip", action=argparse.BooleanOptionalAction, help="average codes with those of the mirror image"
        )
        parser.add_argument("--crf", action="store_true", help="score the trained head after a dense CRF, too")
        parser.add_argument("--seed", type=int, default=0, help="of k-means")
        parser.add_argument("--device", default="auto")
    elif verb == "probe":
        parser.add_argument("run", help="folder made by `hpseg train`")
        parser.add_argument("data", help="name of a data set, or a folder with images/ and labels/ to fit to")
        parser.add_argument("--root", help="folder of the named data set")
        parser.add_argument("--score-on", help="folder with images/ and labels/ to score on, with a folder as data")
        parser.add_argument("--void", type=int, default=255, help="label id that does not count (default 255)")
        parser.add_argument(
            "--protocol", default="default", choices=("default", "stego"), help="how pictures are brought to size"
        )
        parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (default 1000)")
        parser.add_argument("--batch-size", type=int, default=16, help="pictures per step (default 16)")
        parser.add_argument("--lr", type=float, default=1e-3, help="of the linear probe (default 1e-3)")
        parser.add_argument("--cluster-lr", type=float, default=5e-3, help="of the cluster probe (default 5e-3)")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--device", default="auto")
    else:
        _delegate(verb).add_arguments(parser)


def _delegate(verb: str):
    if verb == "demo":
        import hpseg.demo as module
    else:
        import hpseg.pretrain as module
    return module


def run(verb: str, args: argparse.Namespace) -> int | None:
    settings = {name: value for name, value in vars(args).items() if name != "verb"}
    if verb == "train":
        from hpseg.training import train

        train(**settings)
    elif verb == "predict":
        from hpseg.predict import predict_files

        skipped = predict_files(args.run, args.images, args.out, args.overlay, args.device, args.crf)
        if skipped:
            print(f"{len(skipped)} unreadable pictures were skipped", file=sys.stderr)
    elif verb == "eval":
        from hpseg.evaluation.evaluate import evaluate, format_table

        print(format_table(evaluate(**settings)))
    elif verb == "probe":
        from hpseg.evaluation.evaluate import format_table
        from hpseg.evaluation.probes import probe

        print(format_table(probe(**settings)))
    else:
        return _delegate(verb).run(args)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; 0 for success, 2 for a mistake in what was asked, 130 when interrupted."""
    # torch's idle threads spin by default and take the processor from hpkernels' own; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="hpseg", description="Unsupervised semantic segmentation with a frozen ViT.")
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="show the version and exit",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        if argv and argv[0] == verb:
            add_arguments(verb, sub)
    args = parser.parse_args(argv)
    try:
        return run(args.verb, args) or 0
    except UsageError as error:
        print(f"hpseg {args.verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hpseg {args.verb}: interrupted", file=sys.stderr)
        return 130


class _Version(argparse.Action):
    """Asks for the version only when it is wanted: the package that knows it imports torch."""

    def __call__(self, parser, namespace, values, option_string=None):
        from hpkernels import __version__

        print(f"hpseg {__version__}")
        parser.exit()
