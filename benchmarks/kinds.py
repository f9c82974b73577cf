"""A kind of work: what its inputs are, who does it, and the arithmetic that it needs.

A contender is a function of the inputs, one repetition of the job; each does the same job.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import peers
from benchmarks.features import Batch, make_batch
from benchmarks.plan import BACKENDS, OURS, Shape

Contender = Callable[[Any], Any]


@dataclass(frozen=True)
class Kind:
    inputs: Callable[[Shape, str, torch.dtype], Any]
    contenders: dict[str, Contender]
    flop: Callable[[Shape], dict[int, float]] | None = None  # {inner dimension of the products: operations}
    nbytes: Callable[[Shape, int], float] | None = None  # the int is the bytes of one number


def ours(job: Callable[[Any, str | None], Any]) -> dict[str, Contender]:
    """The library by itself, and by each backend asked for by name; job takes the inputs and the `backend` argument."""
    named = {name: name.removeprefix(peers.PREFIX) for name in BACKENDS}
    return {name: functools.partial(_with_backend, job, backend) for name, backend in ({OURS[0]: None} | named).items()}


def _with_backend(job: Callable[[Any, str | None], Any], backend: str | None, inputs: Any) -> Any:
    return job(inputs, backend)


def make_shaped(shape: Shape, device: str, dtype: torch.dtype, **options) -> Batch:
    return make_batch(
        shape.images, shape.grid, channels=shape.channels, code=shape.code, pool=shape.pool, density=shape.density,
        device=device, dtype=dtype, **options,
    )  # fmt: skip
