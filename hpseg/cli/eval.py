"""`hpseg eval RUN DATA`."""

from __future__ import annotations

import argparse

from hpseg.cli.report import add_no_report, leave_page
from hpseg.runtime.messages import waiting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="folder made by `hpseg train`")
    add("data", help="name of a data set, or a folder with images/ and labels/, paired by stem")
    add("--root", help="folder of the named data set")
    add("--split", default="val", help="of the named data set: train or val (default val)")
    add("--fit-on", metavar="PHOTOS", help="photographs k-means is fitted to (default: the run's own)")
    add("--void", type=int, default=255, help="label id that does not count (default 255)")
    add("--rgb", action="store_true", help="add k-means on colours as a second baseline")
    add("--protocol", default="default", choices=("default", "stego"), help="how pictures are brought to size")
    add("--flip", action=argparse.BooleanOptionalAction, help="average codes with those of the mirror image")
    add("--crf", action="store_true", help="score the trained head, and the linear probe, after a dense CRF, too")
    add("--linear", action="store_true", help="score the linear probe in the run's folder, too")
    add("--seeds", action="store_true", help="RUN holds runs of several seeds: mean and sd, also in RUN/eval.json")
    add("--seed", type=int, default=0, help="of k-means")
    add("--strict", action="store_true", help="stop at a picture that cannot be decoded, instead of passing it over")
    add("--device", default="auto")
    add_no_report(parser)


def run(args: argparse.Namespace) -> None:
    with waiting("loading"):
        from hpseg.evaluation.evaluate import evaluate, format_table
        from hpseg.evaluation.seeds import evaluate_seeds

    seeds, page = vars(args).pop("seeds"), vars(args).pop("report")
    print(format_table((evaluate_seeds if seeds else evaluate)(**vars(args))))
    if page and not seeds:
        given = {name: getattr(args, name) for name in ("root", "split", "void", "device")}
        leave_page(args.run, args.data, **given)
