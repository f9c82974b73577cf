"""One published method a file: its trained parts, its loss and its schedule.

A method is an nn.Module with `head` (codes of features), `clusters` (centroids of codes) and

    TERMS                                    names of its loss terms, columns of log.csv
    optimizers() -> {name: optimizer}
    start(source)                            what a fresh run needs before its first step (pools, neighbours, ...)
    renew(step, source)                      called before every step but the first
    keys(batch, seed) -> batch               the views of a step: those of the batch first, then what belongs to them
    losses(tokens, jittered, step, seed, generator) -> {term: 0-dim tensor}
    extra_state() / load_extra_state(state)  what `start` and `renew` made, for the checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hpseg.config import Config


class Source(NamedTuple):
    """Where a method gets features of training images outside of its steps."""

    images: int  # number of training views
    features: Callable[[list[list[int]], int], Iterator[Tensor]]  # batches of view numbers, epoch -> (B, T, C) each
    batch_size: int
    dropout_rng: torch.Generator
    pool_rng: torch.Generator  # on the CPU


def make_method(channels: int, config: Config) -> torch.nn.Module:
    """The method `config.method` for features of that many channels."""
    if config.method == "stego":
        from hpseg.methods.stego import Stego

        return Stego(channels, config)
    from hpseg.methods.hp import HiddenPositives

    return HiddenPositives(channels, config)
