"""The rows of one call of the ops with what decides on their positives, declared once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Labelled(NamedTuple):
    """Rows and keys with their classes and groups: integers below N + M + 1, -1 takes no part; see reference.py."""

    x: Tensor  # (N, D) unit rows
    counts: Tensor  # |P_i|, int64 (N,)
    classes: Tensor  # (N,)
    groups: Tensor | None = None  # (N,); None: every row is a group of its own
    keys: Tensor | None = None  # (M, D); None: the rows themselves
    key_classes: Tensor | None = None  # (M,)
    key_groups: Tensor | None = None  # (M,)
