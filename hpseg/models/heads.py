"""The trainable parts of unsupervised segmentation on frozen features; everything works on tokens (B, T, width)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpkernels
from hpseg.models.backbone import Tokens
from hpseg.runtime.distributed import Share


def channel_dropout(x: Tensor, rate: float, share: Share | None) -> Tensor:
    """Zeroes whole channels of an image with probability `rate`, scales the others by 1/(1 - rate). x: (B, T, C)."""
    if rate == 0:
        return x
    return x * (share.rand(1, x.shape[2]) >= rate) / (1 - rate)


def autocast(x: Tensor, dtype: str) -> torch.autocast:
    """Matrix products in bf16 on the device of x if dtype is "bf16", as they come if it is "fp32"."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16")


def compared(x: Tensor, dtype: str) -> Tensor:
    """x as searches and losses over pairs take it: in bf16 if dtype is "bf16", where a GPU's matrix units compare
    several times as many pairs a second as in fp32. Sums are fp32 either way."""
    return x.bfloat16() if dtype == "bf16" else x


class Head(nn.Module, ABC):
    """What prediction asks of a head: codes of all that the backbone says of a picture, or of a window of it."""

    @abstractmethod
    def codes_of(self, tokens: Tokens) -> Tensor:
        """(B, T, dim) fp32, without dropout."""


class SegmentationHead(Head):
    """Features to segmentation code: s = Linear(drop(f)) + Linear(ReLU(Linear(drop'(f)))), drop and drop' independent.

    Shapes: f (B, T, channels) -> s (B, T, dim), fp32 with any `dtype` of its products ("fp32" or "bf16").
    """

    def __init__(self, channels: int, dim: int, dtype: str = "fp32"):
        super().__init__()
        self.dtype = dtype
        self.linear = nn.Linear(channels, dim)
        self.hidden = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, dim)

    def forward(self, features: Tensor, dropout: float = 0.0, share: Share | None = None) -> Tensor:
        """share: which rows of a batch these are; only for dropout."""
        return self.codes(*(channel_dropout(features, dropout, share) for _ in range(2)))

    def codes_of(self, tokens: Tokens) -> Tensor:
        return self(tokens.features)

    def codes(self, straight: Tensor, hidden: Tensor) -> Tensor:
        """Without random numbers, which torch.compile takes from no generator of one's own."""
        with autocast(straight, self.dtype):
            return (self.linear(straight) + self.out(F.relu(self.hidden(hidden)))).float()

    @torch.no_grad()
    def follow(self, other: SegmentationHead, momentum: float) -> None:
        """Moving average: p <- momentum p + (1 - momentum) q for every parameter q of `other`."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)


class Projection(nn.Linear):
    """Codes (B, T, dim) to the space of the contrastive loss, (B, T, dim) fp32."""

    def __init__(self, dim: int, dtype: str = "fp32"):
        super().__init__(dim, dim)
        self.dtype = dtype

    def forward(self, codes: Tensor) -> Tensor:
        with autocast(codes, self.dtype):
            return super().forward(codes).float()


class Classifier(nn.Linear):
    """Class scores of codes (..., D): (..., K); in the place of ClusterProbe where classes are known by labels."""


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


def fit_centroids(rows: Tensor, classes: int, seed: int) -> Tensor:
    """Centroids (classes, D) of spherical k-means over rows (N, D): the best of ten starts, each run to its end."""
    return hpkernels.kmeans(rows, classes, spherical=True, restarts=10, iterations=50, tolerance=0, seed=seed).centroids
