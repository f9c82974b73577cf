"""How a program ends that is asked to: by Ctrl-C, by a scheduler (SIGTERM), by a terminal that closes (SIGHUP).

All three interrupt as Ctrl-C does. Training finishes its step first and saves it, by a `Stop`. A signal that the
program was started to ignore, as by nohup, stays ignored; outside of the main thread nothing is changed, as only there
Python lets a signal be handled.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ASKED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN_SECONDS = 2.0  # within so long a signal is the same one, from the terminal and from torchrun


class Interrupted(KeyboardInterrupt):
    """The program was asked to end, by signal `number`."""

    def __init__(self, number: int, text: str = ""):
        super().__init__(text or "interrupted" + ("" if number == signal.SIGINT else f" by {name_of(number)}"))
        self.number = number


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def handled(handle: Callable[[int], None]) -> Iterator[None]:
    """Inside, `handle` is called with the number of a signal that asks the program to end."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ASKED}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):  # None: set by what is not Python
            signal.signal(number, lambda number, _: handle(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def interrupt(number: int) -> None:
    raise Interrupted(number)


class Stop:
    """Inside the with block a signal interrupts at once, unless `later` is set: then the first one is noted in `number`
    (0 before), for the program to end where nothing is lost, and only another one, later, interrupts at once."""

    def __init__(self) -> None:
        self.number, self.later, self._since = 0, False, 0.0
        self._handled = handled(self._note)

    def interrupted(self, text: str) -> Interrupted:
        """The exception for the signal that was noted, or for one that another rank heard of."""
        number = self.number or signal.SIGTERM
        return Interrupted(number, f"interrupted by {name_of(number)} {text}")

    def _note(self, number: int) -> None:
        if not self.later or (self.number and time.monotonic() - self._since > AGAIN_SECONDS):
            raise Interrupted(number)
        if not self.number:
            self.number, self._since = number, time.monotonic()

    def __enter__(self) -> Stop:
        self._handled.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._handled.__exit__(*raised)
