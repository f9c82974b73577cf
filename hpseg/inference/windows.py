"""Large pictures in bounded memory: overlapping windows through the backbone, finished rows of maps out.

What a window yields is averaged where windows overlap. Similarities to centroids are linear in the codes, so their
average is the similarity of the averaged code. Maps come in bands of rows, top to bottom, as soon as no later window
touches them, and hpseg.inference.label_map.LabelMap turns bands into labels. Memory holds the picture, its labels and
one band of maps, never more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hpseg.run.errors import UsageError

MAX_TOKENS = 4096  # of one pass through the backbone, unless a window is asked for: 512 x 512 pixels of patch 8


class Windows(NamedTuple):
    """Side and stride in patches: (rows, columns) of a window, which never exceeds the picture's grid."""

    size: tuple[int, int]
    stride: int

    @staticmethod
    def plan(grid: tuple[int, int], patch: int, window: int | None = None, stride: int | None = None) -> Windows:
        """Windows for a picture of `grid` (rows, columns) patches.

        window, stride: pixels, taken to whole patches. By default one window covers a picture of at most MAX_TOKENS
        patches, and a larger one gets squares of its short side, no larger than MAX_TOKENS, half a window apart.
        """
        for name, value, least in (("window", window, 2 * patch), ("stride", stride, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name}: expected at least {least} pixels, got {value}")
        if window is not None:
            side = round(window / patch)
        elif stride is None and grid[0] * grid[1] <= MAX_TOKENS:
            side = max(grid)
        else:
            side = min(*grid, math.isqrt(MAX_TOKENS))
        if stride is not None and stride > side * patch:
            raise UsageError(f"stride: expected at most the window of {side * patch} pixels, got {stride}")
        step = max(1, round(stride / patch) if stride is not None else side // 2)
        return Windows((min(side, grid[0]), min(side, grid[1])), step)


def slide(
    pixels: Tensor, patch: int, windows: Windows, describe: Callable[[Tensor], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Bands of the maps that `describe` makes of a picture (1, 3, H, W), top to bottom, averaged over windows.

    describe: a window (1, 3, h, w) -> named maps (1, K, h / patch, w / patch). Each band holds the same names, with
    maps (1, K, rows, W / patch).
    """
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    tops, lefts = (_starts(length, size, windows.stride) for length, size in zip(grid, windows.size, strict=True))
    rows, columns = windows.size
    in_row, in_column = _covered(tops, rows, grid[0]), _covered(lefts, columns, grid[1])
    sums: dict[str, Tensor] = {}
    for top, following in zip(tops, [*tops[1:], grid[0]], strict=True):
        for left in lefts:
            window = pixels[:, :, top * patch : (top + rows) * patch, left * patch : (left + columns) * patch]
            for name, maps in describe(window).items():
                if name not in sums:
                    sums[name] = maps.new_zeros(1, maps.shape[1], rows, grid[1])
                sums[name][..., left : left + columns] += maps
        done = following - top  # rows that no later window reaches
        times = torch.outer(in_row[top:following], in_column)
        yield {name: total[:, :, :done] / times.to(total) for name, total in sums.items()}
        for name, total in sums.items():
            sums[name] = F.pad(total[:, :, done:], (0, 0, 0, done))


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin: every `stride`, and a last one that ends with the picture."""
    return [*range(0, length - size, stride), length - size]


def _covered(starts: list[int], size: int, length: int) -> Tensor:
    """How many windows cover each place."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + size] += 1
    return counts
