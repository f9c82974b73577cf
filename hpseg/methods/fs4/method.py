"""FS^4: "Fully Self-Supervised Learning for Semantic Segmentation" (Wang et al., arXiv 2202.11981), after the published
description, on a frozen ViT.

Patches are clustered, and the head learns to tell the clusters apart (as PiCIE does); whole views and their cells are
grouped by frozen features, and pooled codes learn to tell those groups apart; a context-aware embedding precedes the
head. The paper's constants are not public: docs/fs4.md says which are ours and where each comes from.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpkernels
from hpseg.data.folder import PhotoFolder, hash_seed
from hpseg.features.clustering import FeatureStream, sample_rows
from hpseg.methods.base import Method, Source
from hpseg.methods.fs4.context_embedding import ContextEmbedding, ContextHead
from hpseg.models.backbone import Backbone, Tokens
from hpseg.models.heads import ClusterProbe, SegmentationHead
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.run.settings.declaration import numbers_of
from hpseg.runtime.distributed import Share
from hpseg.runtime.profile import stage

START_ROWS, START_IMAGES = 65_536, 5_120  # codes that clusters start from, of so many views at most
START_ITERATIONS = 20
GROUPED_CELLS = 1 << 18  # of a level at most, unless there are more groups


class PixelClusters(nn.Module):
    """K unit centroids of unit codes, moved by mini-batches (Sculley 2010): for n_k rows of a batch that are nearest to
    centroid k, m_k such rows so far, it moves to the direction of (1 - eta) mu_k + eta mean_k, eta = n_k / m_k."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(classes, dim))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.float64))  # m_k

    def move(self, sums: Tensor, counts: Tensor) -> None:
        """sums (K, D) of the rows nearest to each centroid, counts (K,) of them."""
        self.counts += counts
        eta = (counts / self.counts.clamp_min(1))[:, None]
        means = sums.double() / counts.clamp_min(1)[:, None]
        moved = (1 - eta) * self.centroids.double() + eta * means
        length = moved.norm(dim=1, keepdim=True)  # where directions cancel to 0, what was there before
        unit = torch.where(length > 0, moved / length.clamp_min(1e-300), self.centroids.double())
        self.centroids.copy_(unit)

    def weights(self, balance: str) -> Tensor:
        """Weight (K,) of each cluster in the loss: its share of the rows ("size"), 1 / (K share) ("inverse"), or 1."""
        share = self.counts / self.counts.sum().clamp_min(1)
        if balance == "none":
            return torch.ones_like(share).float()
        if balance == "size":
            return share.float()
        return torch.where(share > 0, 1 / (len(share) * share), 0.0).float()

    def loss(self, codes: Tensor, labels: Tensor, temperature: float, balance: str, share: Share) -> Tensor:
        """Weighted mean cross-entropy with the centroids as frozen classifier of unit codes (n, D), over all ranks."""
        weights = self.weights(balance)
        logits = codes @ self.centroids.T / temperature
        total = F.cross_entropy(logits, labels, weight=weights, reduction="sum")
        return share.ranks.sum(total) / share.ranks.sum(weights[labels].sum()).clamp_min(1e-30)


def pooled(maps: Tensor, grid: tuple[int, int], level: int) -> Tensor:
    """Means of (b, T, C) over the level x level cells of the grid, as even as can be: (b, level^2, C)."""
    return F.adaptive_avg_pool2d(maps.transpose(1, 2).unflatten(2, grid), level).flatten(2).transpose(1, 2)


class Fs4(Method):
    """Head with context, clusters of patches and groups of cells, and the loss of one step.

    Labels of a view's patches are the nearest centroids of its codes, made by `labeller`: the head as it was when the
    clusters were made ("epoch"), which labels views as one pass over the set would have done then, or as it is.
    """

    TERMS = ("pixel", "pyramid")

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.config = config
        self.levels = numbers_of(config.pyramid_levels) if config.pyramid_weight else []
        groups = numbers_of(config.pyramid_clusters)[: len(self.levels)]
        self.head, self.clusters = self.parts(channels, config)
        self.clusters.requires_grad_(False)
        self.labeller = copy.deepcopy(self.head).requires_grad_(False)
        views = 1 + (config.consistency_weight > 0)
        self.pixels = nn.ModuleList(PixelClusters(config.classes, config.dim) for _ in range(views))
        self.classifiers = nn.ModuleList(nn.Linear(config.dim, count) for count in groups)
        for level, count in enumerate(groups):
            self.register_buffer(f"groups_{level}", torch.zeros(count, channels))
        self.moves: list[list[tuple[Tensor, Tensor]]] = []  # of the step, a view's each, with pixel_update "running"

    @staticmethod
    def open_photographs(config: Config, backbone: Backbone) -> PhotoFolder:
        levels, groups = numbers_of(config.pyramid_levels), numbers_of(config.pyramid_clusters)
        if len(levels) != len(groups):
            raise UsageError(
                f"pyramid_clusters: expected a number for each of pyramid_levels {config.pyramid_levels!r}, got "
                f"{config.pyramid_clusters!r}"
            )
        if not config.pixel_weight and not config.pyramid_weight:
            raise UsageError("pixel_weight, pyramid_weight: expected at least one above 0, got 0 and 0")
        if not config.pixel_weight and config.clusters == "probe":
            raise UsageError("clusters: expected 'kmeans' with pixel_weight 0, which makes no clusters, got 'probe'")
        side = backbone.snap(config.size) // backbone.patch
        if config.pyramid_weight and max(levels) > side:
            raise UsageError(
                f"pyramid_levels: expected at most the {side} patches along a view, got {config.pyramid_levels!r}"
            )
        photographs = Method.open_photographs(config, backbone)
        patches = len(photographs) * side**2
        if patches < config.classes:
            raise UsageError(f"classes: expected at most the {patches} patches of all views, got {config.classes}")
        return photographs

    @staticmethod
    def parts(channels: int, config: Config) -> tuple[ContextHead, ClusterProbe]:
        context = None
        if config.context_attention:
            sigmas = (config.position_sigma, config.colour_sigma)
            context = ContextEmbedding(channels, config.context_dim, config.context_octaves, *sigmas, config.dtype)
        head = ContextHead(SegmentationHead(channels, config.dim, config.dtype), context)
        return head, ClusterProbe(config.dim, config.classes)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        parameters = [*self.head.parameters(), *self.classifiers.parameters()]
        return {"head": torch.optim.Adam(parameters, lr=self.config.lr, weight_decay=self.config.weight_decay)}

    def start(self, source: Source) -> None:
        self._group_cells(0, source)
        self._cluster_patches(0, source)

    def renew(self, step: int, source: Source) -> None:
        config, per_epoch = self.config, max(1, source.images // source.batch_size)
        before, epoch = ((s * config.accumulate) // per_epoch for s in (step - 1, step))
        if config.pyramid_epochs and before // config.pyramid_epochs != epoch // config.pyramid_epochs:
            self._group_cells(epoch, source)
        if before // config.pixel_epochs != epoch // config.pixel_epochs:
            if config.pixel_update == "epoch":
                self._cluster_patches(epoch, source)
            else:
                for clusters in self.pixels:
                    clusters.counts /= 2  # what was counted long ago would hold centroids where codes no longer are

    @torch.no_grad()
    def _group_cells(self, epoch: int, source: Source) -> None:
        """k-means of the directions of pooled frozen features, level by level; from the groups before, if there are."""
        if not self.levels:
            return
        most = max(GROUPED_CELLS // max(self.levels) ** 2, *numbers_of(self.config.pyramid_clusters))
        order = torch.randperm(source.images, generator=source.pool_rng)[:most].tolist()
        cells: list[list[Tensor]] = [[] for _ in self.levels]
        for (view,), share in source.tokens(source.batches(order), epoch):
            for held, level in zip(cells, self.levels, strict=True):
                held.append(share.gather(pooled(view.features, view.grid, level)).flatten(0, 1))
        for level, held in enumerate(cells):
            groups, rows = getattr(self, f"groups_{level}"), torch.cat(held)
            count = min(len(groups), len(rows))  # a few pictures have fewer cells than groups
            again = bool(groups[:count].any())
            options = dict(spherical=True, seed=hash_seed("groups", self.config.seed, level))
            found = hpkernels.kmeans(rows, count, init=groups[:count] if again else "k-means++", **options).centroids
            groups[:count] = source.ranks.from_first(lambda found=found: found.cpu()).to(groups)
            groups[count:] = groups[0]  # the lower number of equals is taken: never these

    @torch.no_grad()
    def _cluster_patches(self, epoch: int, source: Source) -> None:
        """Clusters anew: k-means of some codes of the head as it is now, then one pass of mini-batches over the views
        of this epoch in random order, each kind of view (plain, jittered) for itself."""
        config = self.config
        if not config.pixel_weight:
            return
        self.labeller.load_state_dict(self.head.state_dict())
        batches = source.batches(torch.randperm(source.images, generator=source.pool_rng).tolist())

        def encode(first: int) -> Iterator[Tensor]:
            """Codes of a batch's patches by kind: (rows, kinds, D)."""
            for views, share in source.tokens(batches[first:], epoch, with_twins=len(self.pixels) > 1):
                codes = [F.normalize(self.head.codes_of(view), dim=-1) for view in views]
                yield share.gather(torch.stack(codes, 2)).flatten(0, 1)

        codes = FeatureStream(encode)  # a small set is encoded once
        for kind, clusters in enumerate(self.pixels):
            seed = hash_seed("pixels", config.seed, epoch, kind)
            some = (batch[:, kind] for batch in itertools.islice(codes, -(-START_IMAGES // source.batch_size)))
            rows, _ = sample_rows(some, START_ROWS, seed)
            found = hpkernels.kmeans(rows, config.classes, spherical=True, iterations=START_ITERATIONS, seed=seed)
            clusters.centroids.copy_(source.ranks.from_first(lambda found=found: found.centroids.cpu()))
            clusters.counts.zero_()
        for batch in codes:
            for clusters, own in zip(self.pixels, batch.unbind(1), strict=True):
                nearest = hpkernels.assign_clusters(own.contiguous(), clusters.centroids)
                clusters.move(nearest.sums, nearest.counts)
        self.clusters.centroids.copy_(self.pixels[0].centroids)

    def losses(self, view: Tokens, jittered: Tokens | None, step: int, seed: int, share: Share) -> dict[str, Tensor]:
        """Loss terms of one batch, to be summed: pixel_weight L_pix + pyramid_weight L_pgg.

        view, jittered: tokens of this rank's share of the batch, and of its jittered twins or None.
        """
        config = self.config
        views = [view] if jittered is None else [view, jittered]
        codes = [F.normalize(self.head(tokens, config.dropout, share), dim=-1) for tokens in views]
        with stage("loss"):
            zero = codes[0].new_zeros(())
            return {
                "pixel": config.pixel_weight * self._pixel(views, codes, share) if config.pixel_weight else zero,
                "pyramid": config.pyramid_weight * self._pyramid(view, codes, share) if self.levels else zero,
            }

    def _pixel(self, views: list[Tokens], codes: list[Tensor], share: Share) -> Tensor:
        """(within + w across) / (1 + w): within, the mean over views of CE(view; its centroids, its labels); across, of
        CE(view; the other's centroids, the other's labels); w the consistency_weight. One view: CE."""
        config, running, targets = self.config, self.config.pixel_update == "running", []
        with torch.no_grad():
            for tokens, clusters in zip(views, self.pixels, strict=True):
                labeller = self.head if running else self.labeller
                rows = F.normalize(labeller.codes_of(tokens), dim=-1).flatten(0, 1)
                targets.append(hpkernels.assign_clusters(rows, clusters.centroids))
            if running:
                self.moves.append([(share.ranks.sum(t.sums), share.ranks.sum(t.counts)) for t in targets])

        def term(of: int, by: int) -> Tensor:
            options = (config.pixel_temperature, config.pixel_balance, share)
            return self.pixels[by].loss(codes[of].flatten(0, 1), targets[by].labels, *options)

        if len(views) == 1:
            return term(0, 0)
        within, across = (term(0, 0) + term(1, 1)) / 2, (term(0, 1) + term(1, 0)) / 2
        return (within + config.consistency_weight * across) / (1 + config.consistency_weight)

    def _pyramid(self, view: Tokens, codes: list[Tensor], share: Share) -> Tensor:
        """Mean over levels, cells and views of CE(W_l e + b_l, group): e the code and the group that of the frozen
        feature of a cell, pooled; groups are those of the view without jitter."""
        terms = []
        for level, (cells, classifier) in enumerate(zip(self.levels, self.classifiers, strict=True)):
            features = pooled(view.features, view.grid, cells).flatten(0, 1)
            found = hpkernels.assign_clusters(features, getattr(self, f"groups_{level}"), spherical=True)
            for code in codes:
                logits = classifier(pooled(code, view.grid, cells).flatten(0, 1))
                terms.append(F.cross_entropy(logits, found.labels))
        return share.average(torch.stack(terms).mean())

    @torch.no_grad()
    def follow_up(self, step: int) -> None:
        """Running clusters move with the codes of the step's batches."""
        for moves in self.moves:
            for clusters, move in zip(self.pixels, moves, strict=True):
                clusters.move(*move)
        if self.moves:
            self.moves.clear()
            self.clusters.centroids.copy_(self.pixels[0].centroids)
