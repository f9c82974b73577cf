"""DGCL: "Hunting Sparsity: Density-Guided Contrastive Learning for Semi-Supervised Semantic Segmentation" (Wang et al.,
CVPR 2023), on a ViT, frozen or trained.

A student learns from few labels and from the predictions of its moving average, the teacher. Contrast pulls the
features in the sparse parts of a class towards those in its dense parts, of the batch and of a memory bank.
Docs: docs/dgcl.md, with the constants and what differs from the released code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpkernels
from hpseg.data.few_labels import PADDING, SemiFolder, collate, labelled_keys
from hpseg.data.folder import hash_seed, load_batches
from hpseg.features.tokens import Encoder, Keys
from hpseg.methods.base import Method, Source
from hpseg.methods.dgcl.bank import SCALES, Bank
from hpseg.methods.teacher_labels import cross_entropy, cutmix_masks, hard_pixels, nearest, pseudo_labels
from hpseg.models.backbone import Backbone
from hpseg.models.finetune import parameter_groups, trainable
from hpseg.models.heads import compared
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import Share
from hpseg.runtime.profile import stage

ROWS_OF_CLASS = 10_000  # at most so many of a class and batch, at random, may become anchors and positives


class Batch(NamedTuple):
    """images (2b, 3, S, S) uint8 and label maps (2b, S, S), the b without labels first; pasted (b, S, S) bool: where
    CutMix of those takes a pixel of the next picture."""

    images: Tensor
    labels: Tensor
    pasted: Tensor


class Dgcl(Method):
    """Teacher (`head`, `clusters` and `backbone`: what prediction uses), student, projection and bank, and the loss."""

    TERMS = ("supervised", "unsupervised", "contrast")
    VIEWS = 2

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.config = config
        self.student = nn.ModuleDict(dict(zip(("head", "clusters"), self.parts(channels, config), strict=True)))
        self.head, self.clusters = (copy.deepcopy(part).requires_grad_(False) for part in self.student.values())
        self.projection = nn.Sequential(
            nn.Linear(config.dim, config.dim),
            nn.BatchNorm1d(config.dim, track_running_stats=False),  # of the batch: it takes no part in prediction
            nn.ReLU(),
            nn.Linear(config.dim, config.dim),
        )
        self.bank = Bank(config.classes, config.bank_rows, config.dim)
        self.pending: list[tuple[Tensor, Tensor, Tensor, int]] = []  # rows of the step for the bank
        self.supervised_steps = round(config.steps * config.supervised_share)

    @staticmethod
    def open_photographs(config: Config, backbone: Backbone) -> SemiFolder:
        if config.labeled is None:
            raise UsageError("labeled: method dgcl expects a list of pictures, or a share as 1/8, got none")
        size = backbone.snap(config.size)
        return SemiFolder(config.images, config.root, config.labeled, config.classes, size, config.seed)

    def adopt(self, backbone: Backbone) -> None:
        self.student["backbone"] = trainable(backbone, self.config)
        self.backbone = copy.deepcopy(backbone)

    def trained(self) -> Iterator[nn.Parameter]:
        return self.student.parameters()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        parts = (self.student["head"], self.student["clusters"], self.projection)
        groups = [{"params": [p for part in parts for p in part.parameters()]}]
        if config.finetune:
            groups += parameter_groups(self.student["backbone"], config)
        self.sgd = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
        self.rates = [group["lr"] for group in self.sgd.param_groups]
        return {"student": self.sgd}

    def prepare(self, source: Source) -> None:
        if source.batch_size % source.ranks.size:
            raise UsageError(
                f"batch_size: method dgcl expects as many pictures on every rank, got {source.batch_size} for "
                f"{source.ranks.size} ranks"
            )
        dataset = source.encoder.dataset
        self.unlabelled, self.labelled = len(dataset), len(dataset.label_files)
        self.bank.to(source.encoder.device)
        self.source = source

    def renew(self, step: int, source: Source) -> None:
        """lr (1 - step / steps)^0.9"""
        for group, rate in zip(self.sgd.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - step / self.config.steps) ** 0.9

    def keys(self, batch: list[tuple[int, int]], step: int) -> list[tuple[int, int]]:
        """Each of the batch and, after it, one with labels."""
        with_labels = labelled_keys(batch, self.unlabelled, self.labelled, self.config.seed)
        return [key for pair in zip(batch, with_labels, strict=True) for key in pair]

    def views(self, encoder: Encoder, keys: Keys) -> Iterator[tuple[Batch, None]]:
        """Views with their label maps, and how the pictures are mixed."""

        def noted() -> Iterator[list[tuple[int, int]]]:
            for batch in keys:
                seeds.append(hash_seed("cutmix", self.config.seed, tuple(batch)))
                yield batch

        seeds: list[int] = []
        for views in load_batches(encoder.dataset, noted(), self.config.workers, collate):
            encoder.skip(views.unreadable)
            images, labels = (torch.cat([x[0::2], x[1::2]]) for x in (views.images, views.labels))
            random = torch.Generator().manual_seed(seeds.pop(0))
            pasted = cutmix_masks(len(images) // 2, images.shape[2], random)
            yield Batch(*(x.to(encoder.device, non_blocking=True) for x in (images, labels, pasted))), None

    def losses(self, batch: Batch, jittered: None, step: int, seed: int, share: Share) -> dict[str, Tensor]:
        """Loss terms of one batch, to be summed.

        Over ranks the supervised term is the mean over all labelled pixels. Quantiles, prototypes and negatives are of
        a rank's own pixels, as released, and the other two terms the mean over ranks.
        """
        config, count, size = self.config, len(batch.pasted), batch.labels.shape[1:]
        half = Share(share.ranks, share.total // 2, share.generator)
        head, classify = self.student["head"], self.student["clusters"]
        teacher = self.source.encoder.backbone
        student = self.student["backbone"] if config.finetune else teacher
        supervising = step < self.supervised_steps

        with stage("backbone"):
            seen = student(batch.images[count if supervising else 0 :])
        grid = seen.grid

        def maps(logits: Tensor) -> Tensor:
            return logits.transpose(1, 2).unflatten(2, grid)

        def large(logits: Tensor) -> Tensor:
            return F.interpolate(maps(logits), size, mode="bilinear", align_corners=True)

        codes = head(seen.features[-count:], config.dropout, half)
        truth = batch.labels[count:].clamp_min(-1)
        scores, learned = large(classify(codes)), truth
        if config.ohem_pixels:
            learned = hard_pixels(scores, truth, config.ohem_pixels, config.ohem_probability)
        supervised = cross_entropy(scores, learned, share.ranks)
        zero = supervised * 0
        if supervising:
            return {"supervised": supervised, "unsupervised": zero, "contrast": zero}

        progress = (step - self.supervised_steps) / (config.steps - self.supervised_steps)
        padding = batch.labels[:count] == PADDING
        own = batch.images[:count]
        with torch.no_grad():
            with stage("backbone"):
                features = teacher(own).features if config.finetune else seen.features[:count]
            logits = self.clusters(self.head(features))
            guessed = pseudo_labels(large(logits).softmax(1), padding, config.entropy_drop * (1 - progress))
            guessed = torch.where(batch.pasted, guessed.roll(-1, 0), guessed)
        with stage("backbone"):
            mixed = student(torch.where(batch.pasted[:, None], own.roll(-1, 0), own)).features
        scores = large(classify(head(mixed, config.dropout, half)))
        valid = (guessed >= 0).sum().clamp_min(1)
        unsupervised = cross_entropy(scores, guessed) * (guessed.numel() / valid)

        with torch.no_grad():
            drop = max(config.contrast_drop * (1 - progress), config.contrast_drop_end)
            coarse = pseudo_labels(maps(logits).softmax(1), nearest(padding, grid), drop)
            labels = torch.cat([coarse, nearest(truth, grid)]).flatten()
        codes = torch.cat([head(seen.features[:count], config.dropout, half), codes]).flatten(0, 1)
        projections = self.projection(codes)
        self.pending.append((codes.detach(), projections.detach(), labels, seed))
        contrast = zero
        if config.contrast_by_class or self.bank.full:
            contrast = half.average(self.contrast(codes.detach(), projections, labels, seed))
            contrast = contrast.detach() + config.contrast_grad_scale * (contrast - contrast.detach())
        return {
            "supervised": supervised,
            "unsupervised": config.unsupervised_weight * half.average(unsupervised),
            "contrast": config.contrast_weight * contrast,
        }

    def contrast(self, features: Tensor, projections: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Mean over classes of InfoNCE: the sparsest rows of a class, as anchors, against one prototype of its densest
        rows in batch and bank, and random rows of other classes; features, projections (N, D), labels (N,)."""
        config, random, terms = self.config, torch.Generator().manual_seed(seed), []
        chosen = {}
        for label in labels.unique().tolist():
            if label >= 0 and label != config.contrast_background and self.bank.count(label) == self.bank.rows:
                chosen[label] = _sample(labels == label, ROWS_OF_CLASS, random)
        if not chosen:
            return projections.sum() * 0
        rows = torch.cat(list(chosen.values()))
        densities = self.bank.densities(features[rows], labels[rows], 0).split([len(r) for r in chosen.values()])
        for (label, mine), density in zip(chosen.items(), densities, strict=True):
            if len(mine) <= max(SCALES):
                density = torch.ones_like(density)
            order = density.argsort(stable=True)
            negatives = _sample((labels != label) & (labels >= 0), config.contrast_negatives, random)
            dense = projections[mine[order[-config.positives :]]].detach()
            prototype = torch.cat([dense, self.bank.densest(label, config.positives)]).mean(0, keepdim=True)
            anchors = projections[mine[order[: config.anchors]]]
            keys = torch.cat([prototype, projections[negatives].detach()])
            kinds = torch.ones(len(keys), dtype=torch.int64, device=keys.device)
            kinds[0] = 0
            own = torch.zeros(len(anchors), dtype=torch.int64, device=keys.device)
            terms.append(
                hpkernels.supervised_contrastive_loss(
                    compared(anchors, config.loss_dtype),
                    own,
                    keys=compared(keys, config.loss_dtype),
                    key_labels=kinds,
                    temperature=config.temperature,
                )
            )
        return torch.stack(terms).mean()

    @torch.no_grad()
    def follow_up(self, step: int) -> None:
        """Bank and teacher, after the optimiser's step; both the same on every rank."""
        for rows in self.pending:
            self._remember(*rows)
        self.pending.clear()
        since = step - self.supervised_steps
        momentum = 0.0 if since < self.supervised_steps else min(1 - 1 / (since + 1), self.config.ema_momentum)
        for name, student in self.student.items():
            for mine, theirs in zip(getattr(self, name).parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 1 - momentum)

    def _remember(self, features: Tensor, projections: Tensor, labels: Tensor, seed: int) -> None:
        """Random rows of each class into the bank. Every rank gives its part of them, and what all give is inserted."""
        ranks, inserts = self.source.ranks, self.config.bank_inserts
        random = torch.Generator().manual_seed(hash_seed("bank", seed, ranks.rank))
        present = labels[labels >= 0].unique().tolist()
        rows = [_sample(labels == label, -(-inserts // ranks.size), random) for label in present]
        rows = torch.cat([labels.new_zeros(0), *rows])
        features, projections, labels = features[rows], projections[rows], labels[rows]
        density = self.bank.densities(features, labels, inserts)
        features, projections, labels, density = map(ranks.concat, (features, projections, labels, density))
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero()[:inserts, 0]
            self.bank.insert(label, features[rows], projections[rows], density[rows])

    def extra_state(self) -> dict[str, Tensor]:
        return self.bank.state()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.bank.load_state(state)


def _sample(mask: Tensor, most: int, random: torch.Generator) -> Tensor:
    """At most so many random positions where the mask holds."""
    found = mask.nonzero()[:, 0]
    if len(found) <= most:
        return found
    return found[torch.randperm(len(found), generator=random)[:most].to(found.device)]
