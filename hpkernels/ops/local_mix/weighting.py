"""How neighbour weights are made of logits: what every backend is given, declared once."""

from __future__ import annotations

from typing import NamedTuple


class Weighting(NamedTuple):
    """The grid of the tokens and the numbers of the rule; see reference.py."""

    height: int
    width: int
    sigma: float  # factor of the weights
    low_quantile: float  # each row of logits is clamped to this range first
    high_quantile: float
