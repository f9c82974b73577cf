"""What the package says goes to loggers named after its modules: news as INFO, what a user should know as WARNING.

It configures none of them: `hpseg.cli.main` shows all on stderr, and a program that imports hpseg shows what it likes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
