"""Sums whose rounding does not depend on the number of threads."""

from __future__ import annotations

from torch import Tensor

# A sum to one number of at least so many is what torch shares out among its threads, each of which rounds its part.
_SHARED_OUT = 32_768
_PIECE = 4_096


def sum_last(x: Tensor) -> Tensor:
    """x.sum(-1), on the CPU always in the same order: pieces, each by one thread, then their sums."""
    count = x.shape[-1]
    if not x.is_cpu or count < _SHARED_OUT:
        return x.sum(-1)
    whole = count // _PIECE * _PIECE
    return sum_last(x[..., :whole].unflatten(-1, (-1, _PIECE)).sum(-1)) + x[..., whole:].sum(-1)


def sum_all(x: Tensor) -> Tensor:
    """x.sum(), likewise."""
    return sum_last(x.flatten())
