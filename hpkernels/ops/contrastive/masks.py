"""The pairs of one call of the contrastive ops: what every backend is given, declared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Masks(NamedTuple):
    """Packed pairs of the n anchors i = first_row + r: row r holds the pairs of anchor i with all N rows.

    A pair (i, i) never counts, whatever its bit says.
    """

    positives: Tensor  # P, (n, W)
    positives_t: Tensor | None = None  # P_ji in the place of P_ij; None: P is symmetric
    extra: Tensor | None = None  # Q, (n, W)
    extra_t: Tensor | None = None  # Q_ji; None: Q is symmetric
    negatives: Tensor | None = None  # (R, W), R divides N: row i uses row i mod R
    # E, the pairs of the log-sum-exp. "all": every j != i (negatives None). "dense" or "sparse": P and the negatives'
    # bits, by sweeping all tiles or by gathering the columns that each row of the negatives names. Same result.
    denominator: str = "all"
    first_row: int = 0

    @property
    def anchors(self) -> int:
        """n."""
        return self.positives.shape[0]

    @property
    def everything(self) -> bool:
        """Whether E is every j != i."""
        return self.denominator == "all"

    def period(self, total: int) -> int:
        """R, or N without negatives: anchors that far apart share their random columns."""
        return total if self.negatives is None else self.negatives.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Masks:
        """function of every mask that is there."""
        masks = [None if mask is None else function(mask) for mask in self[:5]]
        return Masks(*masks, *self[5:])  # type: ignore[arg-type]  # the first of them is there

    def addresses(self) -> list[int]:
        """Of the five masks, 0 for those that are not there."""
        return [0 if mask is None else mask.data_ptr() for mask in self[:5]]

    def filled(self) -> list[Tensor]:
        """The five masks, P in the place of one that is not there: for kernels that are told not to read it."""
        return [self.positives if mask is None else mask for mask in self[:5]]
