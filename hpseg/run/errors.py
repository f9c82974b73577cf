"""What can go wrong in a run: a mistake of the caller, a run that stopped, a machine that ran out of something."""

from __future__ import annotations

import re


class UsageError(ValueError):
    """A setting, a path or a file is not what was expected; the message says which, its value and what to do."""


class RunStopped(RuntimeError):
    """Training cannot go on, through no fault of its settings; what it saved is intact."""


class ReportedElsewhere(RunStopped):
    """Training cannot go on because another rank failed, which says so itself."""


def system_reason(error: Exception) -> str | None:
    """In words, what the system would not do, as for a full disk; None for another error."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def memory_reason(error: Exception) -> str | None:
    """In words, that there is too little memory; None for another error. torch says so in several ways."""
    if not isinstance(error, MemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
        return None
    return "out of memory; smaller pictures or batches need less"
