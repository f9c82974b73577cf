"""The rows of one call of the op and the columns that they meet: what every backend is given, declared once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grouped(NamedTuple):
    """Rows with their groups, and keys with theirs; without keys the rows meet each other."""

    x: Tensor  # (N, D) unit rows
    groups: Tensor  # integers (N,), below 2^31; rows of group -1 take no part
    keys: Tensor | None = None  # (M, D) unit rows
    key_groups: Tensor | None = None  # (M,)
