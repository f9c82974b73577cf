"""Cross-entropy over all pixels of class scores that are known per patch, without a graph over the pixels.

Scores S (K, h, w) are brought to the labels' size (H, W) bilinearly, Z = U S with U = A_y (x) A_x, and summed over the
pixels p that count:

    L = sum_p log sum_k exp Z_kp - <S, U^T Y>        Y_kp = 1 where the label is k
    dL/dS = U^T softmax(Z) - U^T Y

U^T Y belongs to a picture and is made once. The rest needs Z a few rows at a time, so that all of it happens in a cache
of the processor: two small matrix products and one exponential for each score. torch's interpolation, log-softmax and
their backward passes come to the same sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

CPU_FLOATS, GPU_FLOATS = 1 << 17, 1 << 24  # of Z at once: half a MiB stays in a core's cache


class Labels(NamedTuple):
    """What the loss needs of a label map (H, W) of classes 0 .. K - 1, others void, on a grid of h x w patches."""

    grid: tuple[int, int]
    counted: Tensor  # (H, W) bool
    pixels: int  # that count
    present: Tensor  # (P,) int64, the classes that occur
    pull: Tensor  # U^T Y (h, P, w) fp32

    @staticmethod
    def of(truth: Tensor, classes: int, grid: tuple[int, int]) -> Labels:
        """truth: integers (H, W)."""
        counted = (truth >= 0) & (truth < classes)
        down, across = (upsampling(*sizes).to(truth.device) for sizes in zip(grid, truth.shape, strict=True))
        found = truth[counted].bincount()
        present = found.nonzero()[:, 0]
        pull = torch.zeros(grid[0], len(present), grid[1], device=truth.device)
        for place, number in enumerate(present):
            pull[:, place] = down.T @ (truth == number).float() @ across
        return Labels(grid, counted, int(found.sum()), present, pull)

    @property
    def bytes(self) -> int:
        return self.counted.nbytes + self.present.nbytes + self.pull.nbytes


@lru_cache(64)
def upsampling(patches: int, pixels: int) -> Tensor:
    """(pixels, patches) fp32: how F.interpolate weights patches for each pixel (bilinear, not align_corners)."""
    place = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * (patches / pixels) - 0.5).clamp(0, patches - 1)
    low = place.floor().long()
    matrix = torch.zeros(pixels, patches, dtype=torch.float64)
    rows, share = torch.arange(pixels), place - low
    matrix[rows, low] = 1 - share
    matrix[rows, (low + 1).clamp_max(patches - 1)] += share
    return matrix.float()


class PixelCrossEntropy:
    """`loss(scores, labels)`: the sum over all pixels that count, a scalar.

    scores: (rows, K) fp32, the patches of one picture after the other, row by row; labels: of each picture, on the same
    device. On a CPU every thread of torch's takes a picture, where by default all would meet several times in each band
    of rows: that takes a third less processor time, and the sums do not depend on their number. To be closed.
    """

    def __init__(self, device: torch.device):
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(threads, "pictures") if threads > 1 else None

    def __call__(self, scores: Tensor, labels: list[Labels]) -> Tensor:
        return _Sum.apply(scores, labels, self._each)

    def __enter__(self) -> PixelCrossEntropy:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.pool:
            self.pool.shutdown()

    def _each(self, *arguments: Iterable[Any]) -> list[Tensor]:
        if self.pool is None:
            return list(map(_of_picture, *arguments))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of one operation
        try:
            return list(self.pool.map(_of_picture, *arguments))
        finally:
            torch.set_num_threads(threads)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, labels: list[Labels], each: Callable) -> Tensor:
        gradient, sizes = torch.empty_like(scores), [one.grid[0] * one.grid[1] for one in labels]
        losses = each(scores.split(sizes), gradient.split(sizes), labels)
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum().to(scores.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None, None


@torch.no_grad()
def _of_picture(scores: Tensor, gradient: Tensor, labels: Labels) -> Tensor:
    """Loss, fp64; its gradient (T, K) by scores (T, K) is written. Everything lies as (rows, K, columns) here."""
    (h, w), (height, width), k = labels.grid, labels.counted.shape, scores.shape[1]
    across = upsampling(w, width).to(scores.device)
    maps = scores.view(h, w, k).transpose(1, 2).contiguous()
    wide = (maps.view(h * k, w) @ across.T).view(h, k * width)
    counted = labels.counted.float()[:, None]
    largest, sums, pulled = torch.empty_like(counted), torch.empty_like(counted), torch.zeros_like(wide)
    step = min(height, max(1, (CPU_FLOATS if scores.device.type == "cpu" else GPU_FLOATS) // (k * width)))
    space = wide.new_empty(step, k * width)
    parts = (_bands(h, height, step), *(of_pixels.split(step) for of_pixels in (counted, largest, sums)))
    for (reached, down), counts, most, total in zip(*parts, strict=True):
        down, flat = down.to(scores.device), space[: len(counts)]
        torch.mm(down, wide[reached], out=flat)
        z = flat.view(-1, k, width)
        torch.amax(z, 1, True, out=most)
        z.sub_(most).exp_()
        torch.sum(z, 1, True, out=total)
        z.mul_(counts / total)
        pulled[reached].addmm_(down.T, flat)
    pulled = (pulled.view(h * k, width) @ across).view(h, k, w).index_add_(1, labels.present, labels.pull, alpha=-1)
    gradient.view(h, w, k).copy_(pulled.transpose(1, 2))
    logarithms = sums.log_().add_(largest).mul_(counted)
    return logarithms.sum(dtype=torch.float64) - (maps[:, labels.present] * labels.pull).sum(dtype=torch.float64)


@lru_cache(64)
def _bands(patches: int, pixels: int, step: int) -> list[tuple[slice, Tensor]]:
    """For `step` rows of pixels at a time, the rows of patches that they lie between, and the weights of these."""
    bands = []
    for rows in upsampling(patches, pixels).split(step):
        used = rows.any(0).nonzero()[:, 0]
        reached = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((reached, rows[:, reached].contiguous()))
    return bands
