"""`hpseg report RUN [DATA]`, and the page that `hpseg train` and `hpseg eval` leave in the run folder."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)
FEW, SECONDS = 6, 5.0  # photographs of the page that other verbs leave, and about how long it may look at them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="folder made by `hpseg train`")
    add(
        "data",
        nargs="?",
        help="what to show and to score on: name of a data set, or a folder with images/ and labels/; or photographs "
        "without labels (default: training photographs, and the scores that `hpseg eval` left)",
    )
    add("--out", help="page to write (default RUN/report.html)")
    add("--compare", metavar="RUN2", help="a second run, side by side with the first")
    add("--n", type=int, default=12, help="photographs to show, 1 to 60 (default 12)")
    add("--root", help="folder of the named data set")
    add("--split", default="val", help="of the named data set: train or val (default val)")
    add("--void", type=int, default=255, help="label id that does not count (default 255)")
    add("--overwrite", action="store_true", help="replace a page of this name")
    add("--device", default="auto")


def run(args: argparse.Namespace) -> None:
    from hpseg.reporting.report import write_report

    print(write_report(**vars(args)))


def add_no_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-report", dest="report", action="store_false", help="write no page about the run, RUN/report.html"
    )


def leave_page(run: str | Path, data: str | Path | None = None, **options) -> None:
    """RUN/report.html, and a line that says where it is. Whatever fails here is said, and costs nothing but the page.
    Of ranks that torchrun started the first writes it."""
    if os.environ.get("RANK", "0") != "0":
        return
    from hpseg.reporting.report import write_report

    try:
        page = write_report(run, data, n=FEW, seconds=SECONDS, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        logger.warning(f"no page about the run was written ({reason}); `hpseg report {run}` tries once more")
    else:
        logger.info(f"the page about it is {page}")
