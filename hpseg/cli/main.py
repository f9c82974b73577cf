"""The command line: `hpseg VERB ...`. A verb's arguments and what it runs stand together in the module named here.

Such a module has `add_arguments(parser)` and `run(args) -> exit status or None`; it is imported when its verb is asked
for, and imports nothing heavy before it runs, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from hpseg.run.errors import ReportedElsewhere, RunStopped, UsageError
from hpseg.runtime.interruption import Interrupted, handled, interrupt
from hpseg.runtime.messages import commanded

VERBS = {  # verb -> (module, what it does)
    "train": ("hpseg.cli.train", "find classes in a folder of photographs, without labels"),
    "predict": ("hpseg.cli.predict", "write a label map for each photograph"),
    "eval": ("hpseg.cli.eval", "score a run against labels, beside k-means on the same frozen features"),
    "probe": ("hpseg.cli.probe", "fit a linear and a cluster probe to labels, on the frozen codes of a run"),
    "show": ("hpseg.cli.show", "draw a contact sheet: photographs, clusters, overlays, frozen features"),
    "report": ("hpseg.cli.report", "write one page about a run: photographs, clusters, scores, curves"),
    "export": ("hpseg.cli.export", "write a run as one file for torch alone"),
    "import-hp": ("hpseg.cli.import_hp", "make a run of a released Hidden Positives checkpoint"),
    "demo": ("hpseg.cli.demo", "train on the photographs in this package and show the result; needs no network"),
    "distill": ("hpseg.cli.distill", "train a small ViT to see what a large network sees"),
    "pretrain": ("hpseg.cli.pretrain", "train a small ViT on your own photographs, without labels"),
}

PIPE_CLOSED = 128 + 13  # as of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line: 0 success, 1 a run that was stopped, 2 a mistake in what was asked, and 128 and the number
    of the signal that interrupted it (Ctrl-C 130, SIGTERM 143), or 141 where nobody reads what is printed."""
    # torch's idle threads spin by default and take the processor from hpkernels' own; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="hpseg", description="Unsupervised semantic segmentation with a frozen ViT.")
    parser.add_argument(
        "-V",
        "--version",
        action=_Version,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="show the version and exit",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    command = None
    for verb, (module, text) in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
        if argv and argv[0] == verb:
            command = importlib.import_module(module)
            command.add_arguments(sub)
    with _streams(), _shown():
        args = parser.parse_args(argv)
        verb = vars(args).pop("verb")
        try:
            with handled(interrupt), commanded():
                for name, value in vars(args).items():
                    if value == "" or (isinstance(value, list) and "" in value):
                        raise UsageError(f"{name}: expected something, got an empty text")
                status = command.run(args) or 0
                sys.stdout.flush()
            return status
        except Exception as error:
            if isinstance(error, ReportedElsewhere):
                return 1
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter says so once more at its end
                return PIPE_CLOSED
            if (reason := _reason(error)) is None:
                raise
            print(f"hpseg {verb}: error: {reason}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
        except KeyboardInterrupt as error:
            print(f"hpseg {verb}: {error or 'interrupted'}", file=sys.stderr)
            return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def _reason(error: Exception) -> str | None:
    """In a sentence, what is wrong with the command line or the machine; None for a mistake of ours."""
    if isinstance(error, UsageError | RunStopped):
        return str(error)
    from hpseg.run.errors import memory_reason, system_reason

    return system_reason(error) or memory_reason(error)


class _Messages:
    """stderr, to which nothing is written when nobody can read it any more: no reason to lose a run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def _streams() -> Iterator[None]:
    """Inside, printing to stderr never fails, and to stdout not for want of a letter; neither may be closed."""
    for descriptor in range(3):  # or a file that is opened next gets the number, and what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, errors = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115
    for stream in (sys.stdout, errors):
        with suppress(AttributeError, OSError):  # what stands in for a stream may not know this
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _Messages(errors)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def _shown() -> Iterator[None]:
    """Inside, what hpseg says is on stderr, a line each. Loggers of a program that calls `main` are left alone, and do
    not say it once more."""
    logger, handler = logging.getLogger("hpseg"), logging.StreamHandler(sys.stderr)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Version(argparse.Action):
    """Asks for the version only when it is wanted: the package that knows it imports torch."""

    def __call__(self, parser, namespace, values, option_string=None):
        from hpkernels import __version__

        print(f"hpseg {__version__}")
        parser.exit()
