"""Statistics of a range of the anchors against all rows: one rank's rows, and panels of rows where all bits do not fit.

Anchors i of a range need every row x_j, but only their own rows of the pairs P and Q. In the forward pass the ranks'
rows are gathered once; then one panel of anchors after another is mined, reduced to three numbers a row, and forgotten.
The gradient dL/dx_i = (1/temperature) sum_j (G_ij + G_ji) x_j knows the other anchors by four numbers each, lse_j and
the incoming gradients of the three statistics: those are gathered, the panels are mined again, and each gives its own
rows of the gradient in full. So no gradient of D numbers a row is ever sent or reduced. A single panel is kept, not
mined twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hpkernels.common.bits import words
from hpkernels.common.ranks import Ranks
from hpkernels.losses.statistics import Denominator, pair_counts, tables_of_calls
from hpkernels.mining import PairRule
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.op import contrastive_grad_rows, contrastive_stats_rows
from hpkernels.ops.pair_average.rows import Rows

T = TypeVar("T")
BITS_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}  # bits of all graphs to hold at a time, by the type of device
PANEL_MULTIPLE = 128  # anchors: whole tiles of every backend


def bits_bytes(device: torch.device) -> int:
    """The most bytes of pair bits to hold at a time: HPKERNELS_BITS_BYTES, else by the device."""
    given = os.environ.get("HPKERNELS_BITS_BYTES")
    if given is not None:
        if not given.isdecimal() or int(given) == 0:
            raise ValueError(f"HPKERNELS_BITS_BYTES: expected a number of bytes > 0, got {given!r}")
        return int(given)
    return BITS_BYTES.get(device.type, BITS_BYTES["cpu"])


def panel_rows(anchors: int, total: int, graphs: int, device: torch.device) -> int:
    """How many anchors have their bits held at a time: all of them if they fit, else a multiple of PANEL_MULTIPLE.

    A function of shapes and the device alone. graphs: 1 for P, 2 for P and Q, of `total` columns.
    """
    bound, row = bits_bytes(device), graphs * 4 * words(total)
    if anchors * row <= bound:
        return anchors
    return min(anchors, max(1, bound // row // PANEL_MULTIPLE) * PANEL_MULTIPLE)


@dataclass
class Anchors:
    """This rank's n anchors and what their pairs with all ranks' rows are made from."""

    rules: list[PairRule]  # how to mine the rows of P, and of Q if there is one
    rows_at_a_time: int  # from `panel_rows`
    denominator: Denominator
    temperature: float
    backend: str
    ranks: Ranks
    count: int
    kept: list[Tensor] | None = None

    def for_each_panel(self, function: Callable[[slice, int, Tensor, Tensor | None], T]) -> list[T]:
        """function(which of this rank's anchors, the first among all ranks', their bits of P, of Q) of each panel."""
        step = max(1, self.rows_at_a_time)
        starts = range(0, max(1, self.count), step)
        return [self._panel(start, min(step, self.count - start), function) for start in starts]

    def _panel(self, start: int, rows: int, function: Callable[[slice, int, Tensor, Tensor | None], T]) -> T:
        # A call of its own, so that nothing holds a panel's bits when the next one is mined.
        first_row = self.ranks.first_row("z") + start
        bits = self.kept or [rule.rows(first_row, rows) for rule in self.rules]
        if rows == self.count:
            self.kept, self.rules = bits, []
        P, Q = bits[0], bits[1] if len(bits) > 1 else None
        return function(slice(start, start + rows), first_row, P, Q)


class _PanelStatistics(torch.autograd.Function):
    """(anchors, x (S_1, n, D), x (S_2, n, D) ..) -> the Rows of all streams, (S, n) and (n,)."""

    @staticmethod
    def forward(ctx, anchors: Anchors, *x: Tensor):
        every = [anchors.ranks.gather(rows, "z", dim=1) for rows in x]

        def of_panel(_, first_row: int, P: Tensor, Q: Tensor | None) -> tuple[Tensor, ...]:
            def evaluate(rows: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
                return contrastive_stats_rows(rows, *masks, anchors.temperature, anchors.backend)

            lse, pos, ext = tables_of_calls(evaluate, every, anchors.denominator.calls(P, None, Q, None, first_row))
            return lse, pos, ext, *pair_counts(P, Q, lse.dtype, anchors.backend)

        parts = anchors.for_each_panel(of_panel)
        statistics = [torch.cat(part, -1) for part in zip(*parts)]
        ctx.anchors = anchors
        ctx.save_for_backward(*every, statistics[0])
        ctx.mark_non_differentiable(*statistics[3:])
        return tuple(statistics)

    @staticmethod
    def backward(ctx, grad_lse: Tensor, grad_pos: Tensor, grad_ext: Tensor, *_):
        anchors = ctx.anchors
        *every, lse = ctx.saved_tensors
        gathered = anchors.ranks.gather(torch.stack([lse, grad_lse, grad_pos, grad_ext]), "z", dim=2)
        of_call = gathered.split([len(rows) for rows in every], dim=1)
        grads = [rows.new_empty(len(rows), anchors.count, rows.shape[2]) for rows in every]

        def of_panel(own: slice, first_row: int, P: Tensor, Q: Tensor | None) -> None:
            calls = anchors.denominator.calls(P, None, Q, None, first_row)
            for rows, (lse, *given), grad in zip(every, of_call, grads):
                none = torch.zeros_like(lse)
                parts = [given] if len(calls) == 1 else [(given[0], none, none), (none, *given[1:])]
                for number, (masks, part) in enumerate(zip(calls, parts)):
                    how = (*masks, anchors.temperature, lse, *part, anchors.backend)
                    share = contrastive_grad_rows(rows, *how)
                    grad[:, own] = share if number == 0 else grad[:, own] + share

        anchors.for_each_panel(of_panel)
        return None, *grads


def panel_statistics(x: list[Tensor], anchors: Anchors) -> Rows:
    """The statistics of this rank's anchors against all ranks' rows; differentiable in x, once, on every rank.

    x: this rank's unit rows, (S_c, n, D) for each call of the op; all calls share the pairs. With several ranks all of
    them run the backward pass, which exchanges 4 S numbers a row.
    """
    apply = _PanelStatistics.apply
    if anchors.ranks.group is not None and torch.compiler.is_compiling():  # a compiled graph cannot hold the exchanges
        apply = torch.compiler.disable(apply)
    return Rows(*apply(anchors, *x))
