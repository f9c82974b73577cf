"""Training on many ranks (`torchrun -m hpseg train ...`): who holds which rows of a batch, what they exchange.

All ranks run the same program with the same random numbers; each works on its own contiguous slice of every batch. A
term of the loss has the value of the whole batch on every rank, and its backward pass gives each rank the part of the
gradient that its rows account for. Gradients of parameters are therefore summed over ranks, never averaged.
A process of its own is a world of one rank, for which every exchange is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hpseg.run.errors import ReportedElsewhere, RunStopped, UsageError, memory_reason, system_reason

T = TypeVar("T")
# How long a rank waits for another before it gives up, as for one that was stopped; one that died is noticed at once.
# What a rank does alone takes less: a shard of cached features, final clusters, a checkpoint.
TIMEOUT = timedelta(minutes=10)
VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets


class Ranks:
    """The ranks of a process group, or one process alone (group None)."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    @property
    def writes(self) -> bool:
        """Only one rank writes files and speaks."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """The own rows among `total`: slices of all ranks follow one another and differ in length by one at most."""
        return self._rows(total, self.rank)

    def _rows(self, total: int, rank: int) -> slice:
        return slice(total * rank // self.size, total * (rank + 1) // self.size)

    def gather(self, x: Tensor, total: int) -> Tensor:
        """All `total` rows from every rank's own ones; the gradient flows to the own rows only."""
        if self.group is None:
            return x
        parts = self._gather(x, [len(range(total)[self._rows(total, rank)]) for rank in range(self.size)])
        parts[self.rank] = x
        return torch.cat(parts)

    def concat(self, x: Tensor) -> Tensor:
        """The rows of every rank, however many each has; without gradient."""
        if self.group is None:
            return x.detach()
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(self.size)]
        dist.all_gather(counts, counts[0].new_tensor([len(x)]), group=self.group)
        return torch.cat(self._gather(x, [int(count) for count in counts]))

    def _gather(self, x: Tensor, counts: list[int]) -> list[Tensor]:
        """Each rank's `counts` rows."""
        padded = x.new_zeros(max(counts), *x.shape[1:])  # not every backend gathers uneven parts
        padded[: len(x)] = x.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def sum(self, share: Tensor) -> Tensor:
        """The sum of every rank's share, the same on all; the gradient goes to the own share."""
        if self.group is None:
            return share
        total = share.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total + (share - share.detach())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if self.group is None:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def collect(self, value: T) -> list[T]:
        """Every rank's value (anything that can be pickled), in order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def agree(self) -> Iterator[None]:
        """What fails inside on one rank fails on all, so that none waits for one that has given up; the first rank that
        failed raises its error, the others ReportedElsewhere. For work without exchanges."""
        error = None
        try:
            yield
        except Exception as found:
            error = found
        messages = self.collect(None if error is None else str(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return
        if failed[0] != self.rank:
            raise ReportedElsewhere(f"rank {failed[0]}: {messages[failed[0]]}") from error
        if self.rank and isinstance(error, UsageError):
            raise UsageError(f"rank {self.rank}: {error}") from error
        raise error

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank."""
        values = [None]
        with self.agree():
            if self.rank == 0:
                values = [make()]
        if self.group is not None:
            dist.broadcast_object_list(values, dist.get_global_rank(self.group, 0), group=self.group)
        return values[0]


ALONE = Ranks()


@dataclass(frozen=True)
class Share:
    """This rank's rows of one batch of `total` images, and their random numbers."""

    ranks: Ranks
    total: int
    generator: torch.Generator  # in the same state on every rank

    @property
    def rows(self) -> slice:
        return self.ranks.rows(self.total)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers (own rows, *shape). Every rank draws those of the whole batch, as one process would."""
        return torch.rand(self.total, *shape, generator=self.generator, device=self.generator.device)[self.rows]

    def gather(self, x: Tensor) -> Tensor:
        """The whole batch from every rank's rows; the gradient flows to the own rows only."""
        return self.ranks.gather(x, self.total)

    def average(self, mean: Tensor) -> Tensor:
        """The mean over the whole batch from the mean over the own rows."""
        return self.ranks.sum(mean * (len(range(self.total)[self.rows]) / self.total))

    def alike(self, value: Tensor) -> Tensor:
        """A value that all ranks computed alike, from gathered rows; each gives an equal part of its gradient."""
        return self.ranks.sum(value / self.ranks.size)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, or those of a process group that the caller has made, or one process alone."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.group.WORLD)
    elif dist.is_available() and VARIABLES <= os.environ.keys():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        ranks = Ranks(dist.group.WORLD)
        try:
            yield ranks
        finally:
            ranks.group = None  # a group that outlives this may abort the process when the interpreter closes
            dist.destroy_process_group()
    else:
        yield ALONE


def own_device(device: torch.device) -> torch.device:
    """Where torchrun started several processes on this machine, the GPU of this one."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cuda" or processes == 1:
        return device
    if device.index is not None:
        raise UsageError(f"device: expected auto, cpu or cuda for {processes} ranks, got '{device}'")
    if processes > torch.cuda.device_count():
        raise UsageError(
            f"device: {processes} ranks need a GPU each, this machine has {torch.cuda.device_count()}; start fewer, "
            "or pass --device cpu"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


@contextmanager
def explained(ranks: Ranks, out: Path) -> Iterator[None]:
    """Says in a sentence why a run cannot go on, where torch, hpkernels or the system say it in their own terms."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        text = str(error)
        if isinstance(error, UsageError | RunStopped):
            raise
        if (reason := system_reason(error)) and error.filename is not None:
            reason = f"out: {reason}"
        elif reason := reason or memory_reason(error):
            pass
        elif isinstance(error, ValueError) and "finite" in text:
            reason = f"loss: {text}; where training has diverged, a smaller lr helps"
        elif isinstance(error, RuntimeError) and "DataLoader worker" in text:
            first, *_, last = [*text.splitlines(), text.splitlines()[-1]]
            fate = f"failed ({last})" if first.startswith("Caught") else f"was killed ({first})"
            reason = f"workers: a data loading process {fate}"
        elif ranks.size > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text):
            reason = f"rank {ranks.rank}: another rank has ended or does not answer"
        else:
            raise
        held = f"; what {out} holds is intact, --resume goes on from there" if out.is_dir() else ""
        raise RunStopped(reason + held) from error
