"""How many columns consecutive rows of the inputs share as positives: what notes.UNIONS holds."""

from __future__ import annotations

import torch

from benchmarks.features import make_batch
from benchmarks.roofline.jobs import JOBS
from benchmarks.roofline.notes import UNIONS

PANEL, EVERY = 128, 12  # every twelfth panel of 128 rows


def count() -> dict[int, int]:
    """Mean number of columns in which any of so many rows has a pair of P or Q."""
    shape = JOBS[0].shape
    batch = make_batch(shape.images, shape.grid, channels=shape.channels, code=shape.code, pool=shape.pool)
    graphs = [(x, (x @ pool.T).amax(1)) for x, pool in _graphs(batch)]
    totals = dict.fromkeys(UNIONS, 0.0)
    starts = range(0, shape.rows - PANEL, PANEL)[::EVERY]
    for start in starts:
        rows = slice(start, start + PANEL)
        pairs = torch.zeros(PANEL, shape.rows, dtype=torch.bool)
        for x, best in graphs:
            pairs |= x[rows] @ x.T > torch.minimum(best[rows, None], best)
        pairs[:, rows].fill_diagonal_(False)
        for size in totals:
            totals[size] += float(pairs.view(-1, size, shape.rows).any(1).sum(1).float().mean())
    return {size: round(total / len(starts)) for size, total in totals.items()}


def _graphs(batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(batch.features, batch.pool), (batch.head_features, batch.head_pool)]
