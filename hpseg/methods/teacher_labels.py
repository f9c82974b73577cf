"""Labels from a teacher's predictions, pictures mixed of two, and cross-entropy where only some pixels count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hpseg.runtime.distributed import ALONE, Ranks


def cutmix_masks(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, size, size) bool: with probability 1/2 nowhere, else one rectangle a picture of half its area."""
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    if torch.rand((), generator=generator) < 0.5:
        return masks
    for mask in masks:
        width = int(torch.randint(size // 2 + 1, size, (), generator=generator))
        height = round(size * size / 2 / width)
        left, top = (int(torch.randint(size - side + 1, (), generator=generator)) for side in (width, height))
        mask[top : top + height, left : left + width] = True
    return masks


def entropy(probabilities: Tensor) -> Tensor:
    """-sum_c P_c log(P_c + 1e-10) over dimension 1."""
    return -(probabilities * (probabilities + 1e-10).log()).sum(1)


def pseudo_labels(probabilities: Tensor, padding: Tensor, drop: float) -> Tensor:
    """argmax of (b, C, h, w); -1 for padding and the `drop` percent of largest entropy among the rest."""
    uncertainty, labels = entropy(probabilities), probabilities.argmax(1)
    counted = uncertainty[~padding].double()
    if len(counted):
        rank = (100 - drop) / 100 * (len(counted) - 1)  # linear quantile; torch.quantile takes 2^24 numbers at most
        ordered = counted.sort().values
        low = int(rank)
        threshold = torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], rank - low)
        labels = labels.masked_fill(uncertainty.double() >= threshold, -1)
    return labels.masked_fill(padding, -1)


def nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Label maps or masks (b, H, W) at another size."""
    return F.interpolate(maps[:, None].double(), size)[:, 0].to(maps.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean of (b, C, H, W) against (b, H, W) over labels >= 0, those of all ranks; 0 where there are none."""
    total = ranks.sum(F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum"))
    return total / ranks.sum((labels >= 0).sum()).clamp_min(1)


@torch.no_grad()
def hard_pixels(logits: Tensor, labels: Tensor, pixels: int, probability: float) -> Tensor:
    """The labels of hard pixels, -1 elsewhere: those whose class has at most `probability`, or the `pixels` whose class
    has the smallest, whichever are more. All labels where there are fewer than `pixels` of them."""
    valid = labels >= 0
    if int(valid.sum()) < pixels:
        return labels
    own = logits.softmax(1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    threshold = own[valid].kthvalue(pixels).values.clamp_min(probability)
    return labels.masked_fill(own > threshold, -1)
