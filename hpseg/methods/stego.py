"""STEGO: "Unsupervised Semantic Segmentation by Distilling Feature Correspondences" (Hamilton et al., ICLR 2022).

Codes of two images should correspond where their frozen features do: of an image with itself, with one of its nearest
neighbours in the training set, and with random others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import hpkernels
from hpseg.data.folder import PhotoFolder, hash_seed
from hpseg.methods.base import Method, Source
from hpseg.models.backbone import Backbone, Tokens
from hpseg.models.heads import ClusterProbe, SegmentationHead, channel_dropout
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import Share
from hpseg.runtime.profile import stage

logger = logging.getLogger(__name__)


def correspondence_loss(
    features_1: Tensor,
    features_2: Tensor,
    codes_1: Tensor,
    codes_2: Tensor,
    shift: float | Tensor,
    *,
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """-mean over images and pairs of points of clamp(S) (F - shift): one correspondence term of STEGO, a 0-dim tensor.

        F_pq = cos(f1_p, f2_q), S_pq = cos(s1_p, s2_q);  pointwise: F' = F - mean_q F, then the mean of F over all is
        restored ("spatial centring");  S is clamped at 0 from below (zero_clamp) and at 0.8 from above (stabilize).

    Memory grows with the number of points, not of pairs; the gradient is made with the loss, and can be taken once.

    Args:
        features_1, features_2: (B, C, h, w) frozen features at sampled points; no gradient.
        codes_1, codes_2: (B, D, h, w) codes at the same points; the gradient flows to both.
        shift: b, the similarity of features from which on codes are pulled together. A float, or a 0-dim tensor, to
            which a gradient flows if it requires one.
        reduction: "mean", or "none" for the terms of all pairs, (B, points, points), of which "mean" is the mean.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected.
    """
    _check_maps(dict(features_1=features_1, features_2=features_2, codes_1=codes_1, codes_2=codes_2))
    b = _shift(shift, codes_1)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    f_1, f_2, s_1, s_2 = map(_points, (features_1, features_2, codes_1, codes_2))
    f_1, f_2 = f_1.detach(), f_2.detach()
    bounds = (0.0 if zero_clamp else -math.inf, 0.8 if stabilize else math.inf)
    centre = _centre(f_1, f_2) if pointwise else f_1.new_zeros(*f_1.shape[:2], 1)
    if reduction == "none":
        return -(s_1 @ s_2.mT).clamp(*bounds) * (f_1 @ f_2.mT + centre - b)
    return _Correspondence.apply(f_1, f_2, s_1, s_2, centre, b, bounds)


def _points(maps: Tensor) -> Tensor:
    """Unit rows (B, points, channels) of maps (B, channels, h, w)."""
    return F.normalize(maps.flatten(2), dim=1, eps=1e-10).mT


def _centre(one: Tensor, other: Tensor) -> Tensor:
    """What spatial centring adds to a point's similarities, (B, points, 1): their mean over q is <f1_p, mean f2>."""
    means = one @ other.mean(1, keepdim=True).mT
    return means.mean() - means


def _shift(shift: float | Tensor, like: Tensor) -> Tensor:
    """shift as a 0-dim tensor of the codes' dtype."""
    if isinstance(shift, Tensor):
        if shift.ndim != 0 or not shift.is_floating_point() or shift.device != like.device:
            raise ValueError(f"shift: expected a float or a 0-dim floating-point tensor on {like.device}, got {shift}")
        return shift.to(like.dtype)
    if not isinstance(shift, (int, float)) or not math.isfinite(shift):
        raise ValueError(f"shift: expected a finite number, got {shift!r}")
    return like.new_tensor(shift)


PAIRS = 1 << 20  # whose similarities are held at a time


class _Correspondence(torch.autograd.Function):
    """(f_1, f_2, s_1, s_2, centre, b, bounds of S) -> the loss, of unit rows (B, points, channels)."""

    @staticmethod
    def forward(ctx, f_1, f_2, s_1, s_2, centre, b, bounds):
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grad_1, grad_2 = (torch.zeros_like(s) if wanted else None for s in (s_1, s_2))
        pairs = len(s_1) * s_1.shape[1] * s_2.shape[1]
        total, agreed = s_1.new_zeros(()), s_1.new_zeros(())
        step = max(1, PAIRS // (len(s_1) * s_2.shape[1]))
        for first in range(0, s_1.shape[1], step):
            rows = slice(first, first + step)
            over = torch.baddbmm(centre[:, rows] - b, f_1[:, rows], f_2.mT)  # F - shift
            agreement = s_1[:, rows] @ s_2.mT
            clamped = agreement.clamp(*bounds)
            total -= torch.vdot(clamped.flatten(), over.flatten())
            agreed += clamped.sum()
            if wanted:
                over.masked_fill_(clamped != agreement, 0)
                grad_1[:, rows] = over @ s_2
                grad_2.baddbmm_(over.mT, s_1[:, rows])
        ctx.pairs = pairs
        ctx.save_for_backward(grad_1, grad_2, agreed)
        return total / pairs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_1, grad_2, agreed = ctx.saved_tensors
        scale = grad / ctx.pairs
        codes = (None, None) if grad_1 is None else (-scale * grad_1, -scale * grad_2)
        return None, None, *codes, None, scale * agreed if ctx.needs_input_grad[5] else None, None


def _check_maps(maps: dict[str, Tensor]) -> None:
    """Raise unless the four can be compared: else a smaller one might be broadcast, or be read where it is not."""

    def described(x: object) -> str:
        return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else repr(x)

    for name, x in maps.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor (B, channels, h, w), got {described(x)}")
        if x.ndim != 4 or x.numel() == 0:
            raise ValueError(f"{name}: expected (B, channels, h, w), none of them 0, got {described(x)}")
    for name, other, axes, what in (
        ("features_2", "features_1", (0, 1), "images, channels and dtype"),
        ("codes_2", "codes_1", (0, 1), "images, channels and dtype"),
        ("codes_1", "features_1", (0, 2, 3), "images and points"),
        ("codes_2", "features_2", (0, 2, 3), "images and points"),
    ):
        x, like = maps[name], maps[other]
        alike = all(x.shape[axis] == like.shape[axis] for axis in axes) and x.device == like.device
        if not alike or (1 in axes and x.dtype != like.dtype):
            raise ValueError(f"{name}: expected the {what} of {other}, {described(like)}, got {described(x)}")


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps (B, C, h, w) at points (B, n, n, 2) in [-1, 1], bilinear: (B, C, n, n)."""
    return F.grid_sample(maps, points, padding_mode="border", align_corners=True)


def other_images(count: int, generator: torch.Generator) -> Tensor:
    """A random image for each of `count`, never itself (unless there is one only): a permutation whose fixed points
    move on by one, so some images may be drawn twice."""
    order = torch.randperm(count, generator=generator)
    return torch.where(order == torch.arange(count), (order + 1) % count, order)


SHIFT_VIEWS = 256  # whose similarities the shifts are quantiles of


class Stego(Method):
    """Head and cluster probe, the nearest neighbours of every training view, the shifts, and the loss of one step."""

    TERMS = ("self", "knn", "random", "cluster")
    VIEWS = 2

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.config = config
        self.head = SegmentationHead(channels, config.dim, config.dtype)
        self.clusters = ClusterProbe(config.dim, config.classes)
        self.neighbors = torch.empty(0, 0, dtype=torch.int64)  # (views, k), nearest first
        self.shifts = torch.tensor([config.self_shift, config.knn_shift, config.random_shift], dtype=torch.float64)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        return {
            "head": torch.optim.AdamW(self.head.parameters(), lr=config.lr, weight_decay=config.weight_decay),
            "clusters": torch.optim.Adam(self.clusters.parameters(), lr=config.cluster_lr),
        }

    @staticmethod
    def open_photographs(config: Config, backbone: Backbone) -> PhotoFolder:
        photographs = Method.open_photographs(config, backbone)
        if len(photographs) < 2:
            raise UsageError("images: STEGO compares views with neighbours, expected two pictures or more, got one")
        return photographs

    @torch.no_grad()
    def start(self, source: Source) -> None:
        self._find_neighbors(source)
        if self.config.shifts == "quantiles":
            self._find_shifts(source)

    def _find_neighbors(self, source: Source) -> None:
        """By cosine of the mean feature of a view, exact, in memory that grows with the number of views."""
        rate, means = self.config.mining_dropout, []
        for features, share in source.features(source.batches(), 0):
            means.append(share.gather(channel_dropout(features, rate, share).mean(1)))
        descriptors = F.normalize(torch.cat(means), dim=1)
        k = min(self.config.neighbors, source.images - 1)
        _, found = hpkernels.topk_similarity(descriptors, descriptors, k, exclude_self=True)
        self.neighbors = found.cpu()

    def _find_shifts(self, source: Source) -> None:
        """The quantiles of the similarities that a step compares, over at most SHIFT_VIEWS views, without labels.

        Published shifts suit the features they were found on: how alike patches are differs by backbone.
        """
        config, rng = self.config, torch.Generator().manual_seed(hash_seed("shifts", self.config.seed))
        views = torch.randperm(source.images, generator=rng)[:SHIFT_VIEWS]
        nearest = self.neighbors[views, torch.randint(self.neighbors.shape[1], (len(views),), generator=rng)]

        def maps(numbers: Tensor) -> Iterator[Tensor]:
            for (view,), share in source.tokens(source.batches(numbers.tolist()), 0):
                features = share.gather(channel_dropout(view.features, config.mining_dropout, share))
                yield features.transpose(1, 2).unflatten(2, view.grid)

        found: list[list[Tensor]] = [[], [], []]
        for own, near, random in zip(maps(views), maps(nearest), maps(views.roll(1)), strict=True):
            size = (len(own), config.feature_samples, config.feature_samples, 2)
            points, other_points = ((torch.rand(size, generator=rng) * 2 - 1).to(own.device) for _ in range(2))
            one = sample_points(own, points)
            others = (one, sample_points(near, other_points), sample_points(random, other_points))
            for kind, other in zip(found, others, strict=True):
                f_1, f_2 = _points(one), _points(other)
                similarity = f_1 @ f_2.mT + (_centre(f_1, f_2) if config.pointwise else 0)
                kind.append(similarity.flatten())
        ranks = self.shifts.tolist()
        values = [np.quantile(torch.cat(kind).cpu(), rank) for kind, rank in zip(found, ranks, strict=True)]
        self.shifts = torch.tensor(values, dtype=torch.float64)
        told = ", ".join(f"{name} {value:.2f}" for name, value in zip(self.TERMS, values, strict=False))
        logger.info(f"shifts, from the similarities of {len(views)} views: {told}")

    def keys(self, batch: list[tuple[int, int]], step: int) -> list[tuple[int, int]]:
        """The batch, and for each of its views one of the neighbours."""
        k, seed = self.neighbors.shape[1], self.config.seed
        chosen = [int(self.neighbors[index, hash_seed("neighbor", seed, epoch, index) % k]) for epoch, index in batch]
        return batch + [(epoch, index) for (epoch, _), index in zip(batch, chosen, strict=True)]

    def extra_state(self) -> dict[str, Tensor]:
        return {"neighbors": self.neighbors, "shifts": self.shifts}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.neighbors = state["neighbors"]
        self.shifts = state.get("shifts", self.shifts)  # older checkpoints have the settings' own

    def losses(self, view: Tokens, jittered: None, step: int, seed: int, share: Share) -> dict[str, Tensor]:
        """Loss terms of one batch, to be summed.

        view: features of this rank's share of 2 B views, those of the batch first, then those of its neighbours. The
        comparison itself is cheap beside the backbone: every rank makes all of it, on the features and codes of all.
        """
        config, count = self.config, share.total // 2
        codes = share.gather(self.head(view.features, config.dropout, share))
        features = share.gather(channel_dropout(view.features, config.mining_dropout, share))

        def sampled(rows: slice | Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
            maps = (x[rows].transpose(1, 2).unflatten(2, view.grid) for x in (features, codes))
            return tuple(sample_points(x, points) for x in maps)

        def term(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], shift: float) -> Tensor:
            with stage("loss"):
                return correspondence_loss(one[0], other[0], one[1], other[1], shift, pointwise=config.pointwise)

        size = (count, config.feature_samples, config.feature_samples, 2)
        points, other_points = (
            torch.rand(size, generator=share.generator, device=codes.device) * 2 - 1 for _ in range(2)
        )
        anchors = sampled(slice(0, count), points)
        images = torch.Generator().manual_seed(seed)
        others = (other_images(count, images).to(codes.device) for _ in range(config.negative_images))
        self_shift, knn_shift, random_shift = self.shifts.tolist()
        random = [term(anchors, sampled(rows, other_points), random_shift) for rows in others]
        return {
            "self": config.self_weight * term(anchors, anchors, self_shift),
            "knn": config.knn_weight * term(anchors, sampled(slice(count, None), other_points), knn_shift),
            "random": config.random_weight * torch.stack(random).mean(),
            "cluster": share.alike(self.clusters.loss(codes[:count])),
        }
