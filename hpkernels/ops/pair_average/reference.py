"""The weighted average of a contrastive loss in plain torch, for every backend without a kernel of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.common.sums import sum_all, sum_last
from hpkernels.ops.pair_average.rows import Rows, Weights


def kept_rows(n_pos: Tensor) -> Tensor:
    """1 for the rows that have a P pair, else 0."""
    return n_pos.clamp(max=1.0)


def pair_average(rows: Rows, weights: Weights) -> Tensor:
    """Mean over streams and images of sum_i (w_i lse_i - v_i (pos_i + lambda ext_i)) / sum_i of the image's weights.

    "pairs": w_i = kept_i (n_pos_i + lambda n_ext_i), v_i = kept_i, and the image's weights are w. "anchors": both
    divided by w_i, the weights are kept. "separate": the mean for P alone (w = n_pos, v = 1), plus lambda times that
    for Q alone. An image without weight adds 0.
    """
    lse, pos, ext, n_pos, n_ext = rows
    extra = weights.extra

    def per_image(numbers: Tensor) -> Tensor:
        return sum_last(numbers.reshape(*numbers.shape[:-1], weights.images, -1))

    def average(numerator: Tensor, weight: Tensor) -> Tensor:
        inverse = per_image(weight).clamp(min=1.0).reciprocal()  # weights are 0, with numerators of 0, or at least 1
        return sum_all(per_image(numerator) * inverse) / (len(lse) * weights.all_images)

    if weights.weighting == "separate":
        mean = average(n_pos * lse - pos, n_pos) + extra * average(n_ext * lse - ext, n_ext)
    else:
        kept = kept_rows(n_pos)
        weight = kept * (n_pos + extra * n_ext)
        numerator = weight * lse - kept * (pos + extra * ext)
        if weights.weighting == "anchors":
            numerator, weight = numerator / torch.where(weight == 0, 1.0, weight), kept
        mean = average(numerator, weight)
    return mean.to(lse.dtype)
