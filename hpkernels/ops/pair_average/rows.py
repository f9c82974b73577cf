"""What is averaged: the statistics of all rows and how they are weighted, declared once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Numbers of each stream and row (S, n), and of each row (n,); rows of one image are consecutive."""

    lse: Tensor
    pos: Tensor
    ext: Tensor
    n_pos: Tensor  # number of P pairs, in the dtype of the other tables
    n_ext: Tensor


class Weights(NamedTuple):
    """How they are averaged."""

    extra: float | Tensor  # lambda, of the extra positives
    images: int  # that the rows are of
    all_images: int  # that the average is taken over
    weighting: str  # "pairs", "anchors" or "separate"

    @property
    def sums(self) -> int:
        """Of weights that an image has."""
        return 2 if self.weighting == "separate" else 1
