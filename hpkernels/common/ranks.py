"""Processes that share one batch: which rows each holds, and the exchanges that a loss over all of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions hold, by their defaults, the process group that is there when torch imports them, as it does at the
    # first compiled op. A group that outlives its destruction keeps threads, which may abort the process at its end.
    import torch.distributed.nn

T = TypeVar("T")
# Its name since torch 2.14, and before; neither where torch was built without distributed.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_ERRORS = {"TypeError": TypeError, "ValueError": ValueError}


class Ranks:
    """The ranks of a process group, and how many rows of each input every one of them holds (`sizes[name][rank]`)."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, sizes: dict[str, list[int]]) -> None:
        self.group = group
        self.rank = rank
        self.sizes = sizes

    def first_row(self, name: str) -> int:
        """Where this rank's rows lie among all ranks' rows."""
        return 0 if self.group is None else sum(self.sizes[name][: self.rank])

    def total(self, name: str, x: Tensor) -> int:
        """Rows of all ranks together; x is this rank's part."""
        return x.shape[0] if self.group is None else sum(self.sizes[name])

    def gather(self, x: Tensor, name: str, dim: int = 0) -> Tensor:
        """All ranks' parts of input `name` behind one another along `dim`. No gradient."""
        if self.group is None:
            return x
        sizes = self.sizes[name]
        part = x.detach().movedim(dim, 0).contiguous()
        out = part.new_empty((sum(sizes), *part.shape[1:]))
        if len(set(sizes)) == 1:
            _all_gather(out, part, group=self.group)
        else:  # not every backend gathers uneven parts
            pieces = out.split(sizes)
            pieces[self.rank].copy_(part)
            work = [self._broadcast(piece, rank) for rank, piece in enumerate(pieces) if piece.numel()]
            for exchange in work:
                exchange.wait()
        return out.movedim(0, dim).contiguous()

    def sum(self, share: Tensor) -> Tensor:
        """The sum of all ranks' shares, bit for bit the same on every rank; its gradient goes to the own share."""
        if self.group is None:
            return share
        shares = [torch.empty_like(share) for _ in range(self.group.size())]
        dist.all_gather(shares, share.detach(), group=self.group)
        return torch.stack(shares).sum(0) + (share - share.detach())

    def of_first(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank."""
        if self.group is not None:
            x = x.clone()
            self._broadcast(x, 0).wait()
        return x

    def _broadcast(self, x: Tensor, rank: int) -> dist.Work:
        assert self.group is not None
        work = dist.broadcast(x, dist.get_global_rank(self.group, rank), group=self.group, async_op=True)
        assert work is not None  # as this process is of the group
        return work


ALONE = Ranks(None, 0, {})


@dataclass
class _Report:
    """What one rank tells the others: the name and the text of its error, or the rows and options it goes on with."""

    error: tuple[str, str] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


def meet(
    group: object, check: Callable[[], T], describe: Callable[[T], tuple[dict[str, int], dict[str, object]]]
) -> tuple[T, Ranks]:
    """Runs `check` on every rank; returns its result there and the Ranks, once all ranks passed and agree.

    describe(result): rows of this rank's inputs by name, and options by name that must be equal on all ranks. An error
    on one rank, or options that differ, raises the same message on every rank: none waits for one that has given up.
    """
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup or None, got {group!r}")
    failure: Exception | None = None
    report = _Report()
    try:
        result = check()
        report.sizes, report.options = describe(result)
    except Exception as error:
        failure, report.error = error, (type(error).__name__, str(error))
    reports = [_Report()] * group.size()
    dist.all_gather_object(reports, report, group=group)
    for rank, other in enumerate(reports):
        if other.error is not None:
            kind, message = other.error
            raise _ERRORS.get(kind, RuntimeError)(f"rank {rank} of process_group: {message}") from failure
    for name, value in reports[0].options.items():
        for rank, other in enumerate(reports):
            if other.options[name] != value:
                raise ValueError(
                    f"{name}: expected the same on every rank of process_group, got {value} on rank 0 and "
                    f"{other.options[name]} on rank {rank}"
                )
    every_size = {name: [other.sizes[name] for other in reports] for name in report.sizes}
    return result, Ranks(group, group.rank(), every_size)
