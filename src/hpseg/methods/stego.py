"""STEGO: "Unsupervised Semantic Segmentation by Distilling Feature Correspondences" (Hamilton et al., ICLR 2022).

Codes of two images should correspond where their frozen features do: of an image with itself, with one of its nearest
neighbours in the training set, and with random others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def correspondence_loss(
    features_1: Tensor,
    features_2: Tensor,
    codes_1: Tensor,
    codes_2: Tensor,
    shift: float,
    *,
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
) -> Tensor:
    """-mean over images and pairs of points of clamp(S) (F - shift): one correspondence term of STEGO, a 0-dim tensor.

        F_pq = cos(f1_p, f2_q), S_pq = cos(s1_p, s2_q);  pointwise: F' = F - mean_q F, then the mean of F over all is
        restored ("spatial centring");  S is clamped at 0 from below (zero_clamp) and at 0.8 from above (stabilize).

    Args:
        features_1, features_2: (B, C, h, w) frozen features at sampled points; no gradient.
        codes_1, codes_2: (B, D, h, w) codes at the same points; the gradient flows to both.
        shift: b, the similarity of features from which on codes are pulled together.
    """
    f_1, f_2, s_1, s_2 = (
        F.normalize(x.flatten(2), dim=1, eps=1e-10) for x in (features_1, features_2, codes_1, codes_2)
    )
    with torch.no_grad():
        similarity = f_1.transpose(1, 2) @ f_2
        if pointwise:
            mean = similarity.mean()
            similarity = similarity - similarity.mean(2, keepdim=True)
            similarity = similarity - similarity.mean() + mean
    agreement = s_1.transpose(1, 2) @ s_2
    if zero_clamp:
        agreement = agreement.clamp_min(0)
    if stabilize:
        agreement = agreement.clamp_max(0.8)
    return -(agreement * (similarity - shift)).mean()


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps (B, C, h, w) at points (B, n, n, 2) in [-1, 1], bilinear: (B, C, n, n)."""
    return F.grid_sample(maps, points, padding_mode="border", align_corners=True)


def other_images(count: int, generator: torch.Generator) -> Tensor:
    """A random image for each of `count`, never itself (unless there is one only): a permutation whose fixed points
    move on by one, so some images may be drawn twice."""
    order = torch.randperm(count, generator=generator)
    return torch.where(order == torch.arange(count), (order + 1) % count, order)
