"""What the losses on masks know of the pairs: three statistics a row, and the one weighted average that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels.common.sums import sum_all, sum_last
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.op import contrastive_stats
from hpkernels.ops.normalize.op import normalize_rows
from hpkernels.ops.pair_bits.op import count_bits, transpose_bits
from hpkernels.pairs import PairMask


class LossStats(NamedTuple):
    """0-dim tensors on the loss's device; reading one synchronises, computing them does not."""

    positives_per_anchor: Tensor  # mean number of P pairs of a row
    kept_fraction: Tensor  # share of rows that have a P pair
    mean_lse: Tensor  # mean of LSE_i over rows and streams


class Statistics(NamedTuple):
    """What the losses know of the pairs: numbers of each stream and row (S, n), and of each row (n,)."""

    lse: Tensor
    pos: Tensor
    ext: Tensor
    n_pos: Tensor  # number of P pairs, in the dtype of the other tables
    n_ext: Tensor


class Denominator(NamedTuple):
    """E, the pairs of the log-sum-exp: P, the rows of `negatives`, and Q if it has the extra positives too."""

    negatives: Tensor | None  # packed (R, N), the same on all ranks
    form: str  # as `denominator` of contrastive_stats
    with_extra: bool = False

    def calls(
        self, P: Tensor, P_t: Tensor | None, Q: Tensor | None, Q_t: Tensor | None, first_row: int = 0
    ) -> list[Masks]:
        """The masks of contrastive_stats: of the call for lse and of that for pos and ext, or of one for all three.

        The kernels hold P and the negatives in E. For Q in it lse takes P | Q as P; the sums need no negatives.
        """
        if Q is None or not self.with_extra or self.form == "all":
            return [Masks(P, P_t, Q, Q_t, self.negatives, self.form, first_row)]
        symmetric = P_t is None and Q_t is None
        union_t = None if symmetric else (P if P_t is None else P_t) | (Q if Q_t is None else Q_t)
        of_lse = Masks(P | Q, union_t, None, None, self.negatives, self.form, first_row)
        return [of_lse, Masks(P, P_t, Q, Q_t, None, "sparse", first_row)]


def tables_of_calls(
    evaluate: Callable[[Tensor, Masks], tuple[Tensor, Tensor, Tensor]], x: list[Tensor], calls: list[Masks]
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, pos and ext of all streams; evaluate(rows of some, masks of a call) has those of its streams."""
    found = [[_joined(table) for table in zip(*(evaluate(rows, masks) for rows in x))] for masks in calls]
    return found[0][0], found[-1][1], found[-1][2]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def unit_rows(streams: list[Tensor], backend: str) -> list[Tensor]:
    """Unit rows, (S_c, n, D) for each call of the contrastive op.

    On a GPU all streams share launches and column lists. On a CPU one call a stream: the backward pass then holds the
    gradient of one stream at a time beside the unit rows.
    """
    x = [normalize_rows(rows, name, backend)[None] for rows, name in zip(streams, ("z", "z_local"))]
    return x if x[0].is_cpu else [_joined(x)]


def statistics_of_all(
    x: list[Tensor], pairs: list[PairMask], denominator: Denominator, temperature: float, backend: str
) -> Statistics:
    """The statistics of all rows at once; pairs: P, or P and Q."""
    P, Q = pairs[0], pairs[1] if len(pairs) > 1 else None
    bits = (P.bits, _transpose(P, backend), None if Q is None else Q.bits, _transpose(Q, backend))
    evaluate = partial(contrastive_stats, temperature=temperature, backend=backend)
    lse, pos, ext = tables_of_calls(evaluate, x, denominator.calls(*bits))
    return Statistics(lse, pos, ext, *pair_counts(P.bits, None if Q is None else Q.bits, lse.dtype, backend))


def pair_counts(P: Tensor, Q: Tensor | None, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    """Pairs of each row by their bits: n_pos and n_ext of the Statistics."""
    counts = count_bits([P] if Q is None else [P, Q], backend).to(dtype)
    return counts[0], torch.zeros_like(counts[0]) if Q is None else counts[1]


def _transpose(mask: PairMask | None, backend: str) -> Tensor | None:
    if mask is None or mask.symmetric:
        return None
    return transpose_bits(mask.bits, mask.columns, backend)


def average(statistics: Statistics, extra_weight: float | Tensor, tokens: int, total: int, weighting: str) -> Tensor:
    """The loss before its scale, of the images at hand: as a share of what all `total` rows make."""
    lse, pos, ext, n_pos, n_ext = statistics
    streams, count = lse.shape
    images, all_images = max(1, count // tokens), max(1, total // tokens)

    def per_image(rows: Tensor) -> Tensor:
        return sum_last(rows.reshape(*rows.shape[:-1], images, -1))

    def average(numerator: Tensor, weight: Tensor) -> Tensor:
        """Mean over streams and images of sum(numerator) / sum(weight); an image without weight adds 0."""
        inverse = per_image(weight).clamp(min=1.0).reciprocal()  # weights are 0, with numerators of 0, or at least 1
        return sum_all(per_image(numerator) * inverse) / (streams * all_images)

    if weighting == "separate":
        loss = average(n_pos * lse - pos, n_pos) + extra_weight * average(n_ext * lse - ext, n_ext)
    else:
        kept = _kept(n_pos)
        weight = kept * (n_pos + extra_weight * n_ext)
        rows = weight * lse - kept * (pos + extra_weight * ext)
        if weighting == "anchors":
            rows, weight = rows / torch.where(weight == 0, 1.0, weight), kept
        loss = average(rows, weight)
    return loss.to(lse.dtype)


def loss_stats(statistics: Statistics, total: int) -> LossStats:
    """Of the rows at hand, as shares of what all `total` rows make."""
    lse, n_pos, anchors = statistics.lse.detach(), statistics.n_pos, max(1, total)
    return LossStats(sum_all(n_pos) / anchors, sum_all(_kept(n_pos)) / anchors, sum_all(lse) / (anchors * lse.shape[0]))


def _kept(n_pos: Tensor) -> Tensor:
    """1 for the rows that have a P pair, else 0."""
    return n_pos.clamp(max=1.0)
