"""The trainable parts of unsupervised segmentation on frozen features; everything works on tokens (B, T, width)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def channel_dropout(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Zeroes whole channels of an image with probability `rate`, scales the others by 1/(1 - rate). x: (B, T, C)."""
    if rate == 0:
        return x
    keep = torch.rand(x.shape[0], 1, x.shape[2], device=x.device, generator=generator) >= rate
    return x * keep / (1 - rate)


class SegmentationHead(nn.Module):
    """Features to segmentation code: s = Linear(drop(f)) + Linear(ReLU(Linear(drop'(f)))), drop and drop' independent.

    Shapes: f (B, T, channels) -> s (B, T, dim).
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(channels, dim)
        self.hidden = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, dim)

    def forward(self, features: Tensor, dropout: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        straight = self.linear(channel_dropout(features, dropout, generator))
        return straight + self.out(F.relu(self.hidden(channel_dropout(features, dropout, generator))))

    @torch.no_grad()
    def follow(self, other: SegmentationHead, momentum: float) -> None:
        """Moving average: p <- momentum p + (1 - momentum) q for every parameter q of `other`."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)


class ClusterProbe(nn.Module):
    """K centroids; a patch belongs to the centroid of largest cosine. Trained as cosine k-means by gradient descent."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(classes, dim))

    def forward(self, codes: Tensor) -> Tensor:
        """<s, c_k / |c_k|> for codes (..., D): (..., K). Not divided by |s|: that changes no choice of k."""
        return codes @ F.normalize(self.centroids, dim=-1).T

    def loss(self, codes: Tensor) -> Tensor:
        """-mean over patches of max_k cos(s, c_k); gradient to the centroids only."""
        return -self(F.normalize(codes.detach(), dim=-1)).amax(-1).mean()
