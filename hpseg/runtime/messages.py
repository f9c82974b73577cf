"""What the package says goes to loggers named after its modules: news as INFO, what a user should know as WARNING.

It configures none of them: `hpseg.cli.main` shows all on stderr, and a program that imports hpseg shows what it likes.
Whatever takes long says so: `progress` over items, `waiting` for what has none. On a terminal both are bars, which go
away; elsewhere they are lines, the first after LINE_SECONDS and the next ones ever farther apart, so that hours of work
give a hundred lines and not ten thousand.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
BAR_SECONDS = 0.5  # what is quicker needs no bar
LINE_SECONDS, LINE_SHARE = 2.0, 0.1  # at least so long between two lines, and such a share of what has passed


@contextmanager
def muted(wanted: bool) -> Iterator[None]:
    """Inside, where that is wanted, hpseg gives no news; warnings still come."""
    logger = logging.getLogger("hpseg")
    before = logger.level
    if wanted:
        logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)


class Pace:
    """When the next line about long work is due."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()

    def due(self) -> bool:
        now = time.perf_counter()
        if now - self.last < max(LINE_SECONDS, LINE_SHARE * (now - self.began)):
            return False
        self.last = now
        return True

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def progress(items: Iterable[Item], what: str, total: int, unit: str = "image") -> Iterator[Item]:
    """The items, `total` of them, while a bar or lines tell how far the work on them is."""
    from tqdm import tqdm  # not before it is needed: the command line answers mistakes at once

    # disable=None: off a terminal
    bar = tqdm(items, what, total, unit=unit, leave=False, delay=BAR_SECONDS, disable=_muted() or None)
    if not bar.disable:
        yield from bar
        return
    pace = Pace()
    for number, item in enumerate(items):
        if number and pace.due():
            left = pace.seconds / number * (total - number)
            logger.info(f"{what}: {number} of {total}, {left:.0f} s left")
        yield item


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Inside, a thread tells how long something has taken that cannot tell how far it is."""
    if _muted():
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_tell_seconds, args=(what, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tell_seconds(what: str, ended: threading.Event) -> None:
    pace, bar = Pace(), None
    while not ended.wait(BAR_SECONDS):
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False, disable=None)
        if not bar.disable:
            bar.refresh()
        elif pace.due():
            logger.info(f"{what}: {pace.seconds:.0f} s")
    if bar is not None:
        bar.close()


def _muted() -> bool:
    return logging.getLogger("hpseg").level > logging.INFO


class Stopwatch:
    """Wall seconds of a command and of its phases, which follow one another."""

    def __init__(self, phase: str):
        self.began = self._since = _command.get() or time.perf_counter()
        _command.set(None)  # the command's later ones are about themselves
        self._phase, self._spent = phase, dict[str, float]()

    def phase(self, name: str) -> None:
        """Ends the phase there was; from here on it is `name`, for the first time or again."""
        now = time.perf_counter()
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now

    def results(self) -> dict:
        """Up to now: {"seconds": of the whole, "phases": {name: seconds}}."""
        self.phase(self._phase)
        phases = {name: round(seconds, 2) for name, seconds in self._spent.items()}
        return {"seconds": round(self._since - self.began, 2), "phases": phases}


_command: ContextVar[float | None] = ContextVar("began", default=None)


@contextmanager
def commanded() -> Iterator[None]:
    """Inside runs a command line: its first stopwatch counts from here on, with the imports that a verb begins with."""
    token = _command.set(time.perf_counter())
    try:
        yield
    finally:
        _command.reset(token)
