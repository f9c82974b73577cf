"""Cross-image pixel contrast with auxiliary labels, after the published description of "Looking Beyond Single Images
for Contrastive Semantic Segmentation Learning" (Zhang, Torr, Ranftl, Richter, NeurIPS 2021), on a ViT,
frozen or trained.

A frozen network's features of the whole training set are clustered; the clusters are labels by which pixels of
different photographs attract or repel each other. With a few true labels the head is then fine-tuned to them.
Docs: docs/lookbeyond.md, with what is known of the paper and what is not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import hpkernels
from hpseg.data.datasets import training_images
from hpseg.data.few_labels import VOID, blank_view, collate, labelled_keys, open_labelled, random_view, read_truth
from hpseg.data.folder import PhotoFolder, hash_seed, load_batches
from hpseg.data.transforms import UnreadableImage
from hpseg.features.tokens import Encoder, Keys
from hpseg.methods.base import Method, Source
from hpseg.methods.lookbeyond.auxiliary_labels import FILE, AuxiliaryLabels, auxiliary_labels
from hpseg.methods.lookbeyond.pair_quality import PairQuality, describe
from hpseg.methods.teacher_labels import cross_entropy
from hpseg.models.backbone import Backbone
from hpseg.models.extractor import load_extractor
from hpseg.models.finetune import parameter_groups, trainable
from hpseg.models.heads import compared
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.run.files import write_json
from hpseg.runtime.distributed import Share
from hpseg.runtime.profile import stage

logger = logging.getLogger(__name__)


class Photographs(PhotoFolder):
    """The training set, and the (image, label) pairs of `data` in it whose labels are trained on."""

    def __init__(self, config: Config, size: int):
        files, read = training_images(config.images, config.root)
        super().__init__(files, size, config.crop, config.seed, False, read)
        self.data, self.pairs = None, []
        if config.labeled is not None:
            self.data, self.pairs = open_labelled(config.images, config.root, config.labeled, config.seed)


class LabelMapViews(Dataset):
    """Random views (pixels, labels, unreadable) by (epoch, index): the photographs with their auxiliary labels first,
    then the pictures with true labels."""

    def __init__(self, photographs: Photographs, auxiliary: AuxiliaryLabels | None, classes: int):
        self.photographs, self.auxiliary, self.classes = photographs, auxiliary, classes

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, list[str]]:
        epoch, index = key
        folder, count = self.photographs, len(self.photographs)
        path = folder.files[index] if index < count else folder.pairs[index - count][0]
        try:
            image = folder.read(path)
        except UnreadableImage:
            return blank_view(path, folder.size)
        if index < count:
            labels = self.auxiliary[index]
        else:
            labels = read_truth(folder.data, folder.pairs[index - count][1], image.size, self.classes)
        random = torch.Generator().manual_seed(hash_seed("view", folder.seed, epoch, index))
        return *random_view(image, labels, folder.size, random), []


class Batch(NamedTuple):
    """Images (B, 3, S, S) uint8 and their label maps (B, S, S) with VOID and PADDING."""

    images: Tensor
    labels: Tensor


def sample_balanced(labels: Tensor, count: int, cap: int, random: torch.Generator) -> Tensor:
    """Numbers of at most `count` patches of labels (B, T) >= 0, on the CPU: at most `cap` random ones of a label in an
    image, and of those as many of each label as there are, or as of the others: (n,) among B T."""
    flat, images = labels.flatten(), torch.arange(len(labels)).repeat_interleave(labels.shape[1])
    valid = (flat >= 0).nonzero()[:, 0]
    order = valid[torch.randperm(len(valid), generator=random)]
    order = order[_ranks_within(flat[order] * len(labels) + images[order]) < cap]
    return order[_ranks_within(flat[order]).argsort(stable=True)[:count]]


def _ranks_within(groups: Tensor) -> Tensor:
    """0, 1, .. for the first, second, .. entry of each group."""
    order = groups.argsort(stable=True)
    ordered = groups[order]
    ranks = torch.arange(len(groups)) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(ranks).scatter_(0, order, ranks)


class LookBeyond(Method):
    """Head, projection for the contrast and clusters, and the loss of one step."""

    TERMS = ("contrast", "supervised")

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.config = config
        self.head, self.clusters = self.parts(channels, config)
        width = config.contrast_dim
        norm = nn.BatchNorm1d(width, track_running_stats=False)  # of the batch: it takes no part in prediction
        self.projection = nn.Sequential(
            nn.Linear(config.dim, width, bias=False), norm, nn.ReLU(), nn.Linear(width, width)
        )
        fine_tuned = round(config.steps * config.fine_tune_share) if config.learns_classes else 0
        self.contrast_steps = config.steps - fine_tuned
        self.auxiliary: AuxiliaryLabels | None = None
        self.dataset: LabelMapViews | None = None

    @staticmethod
    def open_photographs(config: Config, backbone: Backbone) -> Photographs:
        if config.labeled is None and config.clusters != "kmeans":
            raise UsageError(
                f"clusters: expected 'kmeans' with method lookbeyond and no labels, got {config.clusters!r}"
            )
        if config.labeled is not None and round(config.steps * config.fine_tune_share) == 0:
            raise UsageError(
                f"fine_tune_share: expected at least one of {config.steps} steps on the labels of {config.labeled!r}, "
                f"got {config.fine_tune_share}"
            )
        return Photographs(config, backbone.snap(config.size))

    def adopt(self, backbone: Backbone) -> None:
        self.backbone = trainable(backbone, self.config)

    def trained(self) -> Iterator[nn.Parameter]:
        yield from self.head.parameters()
        if self.config.finetune:
            yield from self.backbone.parameters()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        parts = (self.head, self.projection, self.clusters)
        groups = [{"params": [parameter for part in parts for parameter in part.parameters()]}]
        if config.finetune:
            groups += parameter_groups(self.backbone, config)
        # The head's biases do not move the contrast, which normalises a batch: with Adam's own eps, 1e-8, gradients
        # that are zero but for rounding would make steps of the size of the rate.
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, eps=1e-6)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._set_rates(0)
        return {"parts": self.optimizer}

    def _set_rates(self, step: int) -> None:
        """lr (1 - t / n)^0.9 in both stages, t of n steps done."""
        own, done, steps = self.config.lr, step, self.contrast_steps
        if step >= steps:
            own, done, steps = self.config.fine_tune_lr, step - steps, self.config.steps - steps
        for group, rate in zip(self.optimizer.param_groups, [own, *self.rates[1:]], strict=True):
            group["lr"] = rate * (1 - done / steps) ** 0.9

    def prepare(self, source: Source) -> None:
        """Auxiliary labels, unless no step needs them. Here the backbone is still as it was before any training."""
        config, encoder, ranks = self.config, source.encoder, source.ranks
        self.source = source
        photographs = encoder.dataset
        if self.contrast_steps:
            extractor = encoder.backbone
            if config.extractor or config.extractor_weights:
                name = config.extractor or "embedded"
                settings = (config.extractor_weights, config.extractor_stride, config.dtype, config.pos_embed)
                with ranks.agree():
                    extractor = load_extractor(name, *settings).to(encoder.device)
            self.auxiliary, unreadable = auxiliary_labels(
                source.run / FILE, extractor, photographs, config, encoder.device, ranks
            )
            with ranks.agree():
                encoder.skip(sorted(unreadable))
            found = self.auxiliary.tensors["labels"]
            logger.info(
                f"auxiliary labels: {self.auxiliary.clusters} clusters of {len(found)} patches, of which "
                f"{int((found < 0).sum())} are outliers"
            )
        self.dataset = LabelMapViews(photographs, self.auxiliary, config.classes)
        for parameter in self.projection.parameters():  # every rank projects the rows of all: see `contrast`
            parameter.register_hook(lambda gradient: gradient / ranks.size)

    def start(self, source: Source) -> None:
        """The quality of the auxiliary labels, on the pictures whose labels are trained on."""
        if not (self.auxiliary and self.dataset.photographs.pairs):
            return
        scores = source.ranks.from_first(lambda: label_quality(self.dataset))
        logger.info(describe(scores))
        if source.ranks.writes:
            write_json(source.run / "label_quality.json", scores)

    def renew(self, step: int, source: Source) -> None:
        self._set_rates(step)

    def keys(self, batch: list[tuple[int, int]], step: int) -> list[tuple[int, int]]:
        """The batch, or in the steps on labels as many pictures that have some."""
        if step < self.contrast_steps:
            return batch
        photographs = self.dataset.photographs
        return labelled_keys(batch, len(photographs), len(photographs.pairs), self.config.seed)

    def views(self, encoder: Encoder, keys: Keys) -> Iterator[tuple[Batch, None]]:
        for views in load_batches(self.dataset, keys, self.config.workers, collate):
            encoder.skip(views.unreadable)
            yield Batch(*(x.to(encoder.device, non_blocking=True) for x in (views.images, views.labels))), None

    def losses(self, batch: Batch, jittered: None, step: int, seed: int, share: Share) -> dict[str, Tensor]:
        """Loss terms of one batch, to be summed; one of them is zero."""
        with stage("backbone"):
            tokens = self.source.encoder.backbone(batch.images)
        codes, grid = self.head(tokens.features, self.config.dropout, share), tokens.grid
        labels = batch.labels.clamp_min(VOID)
        if step < self.contrast_steps:
            contrast = self.contrast(codes, _nearest(labels, grid), seed, share)
            return {"contrast": contrast, "supervised": contrast * 0}
        maps = self.clusters(codes).transpose(1, 2).unflatten(2, grid)
        logits = F.interpolate(maps, labels.shape[1:], mode="bilinear", align_corners=False)
        supervised = cross_entropy(logits, labels, share.ranks)
        return {"contrast": supervised * 0, "supervised": supervised}

    def contrast(self, codes: Tensor, labels: Tensor, seed: int, share: Share) -> Tensor:
        """Contrast of sampled patches of the whole batch; codes (b, T, D) and labels (b, T) are this rank's.

        Each rank makes all of it. The gradient reaches its own codes only, but all of the projection, on every rank.
        """
        config = self.config
        codes, labels = share.gather(codes), share.gather(labels)
        random = torch.Generator().manual_seed(seed)
        rows = sample_balanced(labels.cpu(), config.contrast_pixels, config.contrast_cap, random).to(codes.device)
        if len(rows) < 2:  # nothing to compare, and no statistics of a batch
            return codes.sum() * 0
        return hpkernels.supervised_contrastive_loss(
            compared(self.projection(codes.flatten(0, 1)[rows]), config.loss_dtype),
            labels.flatten()[rows],
            image_ids=rows // labels.shape[1] if config.cross_image_only else None,
            temperature=config.temperature,
            ignore_index=VOID,
            form=config.contrast_form,
        )

    def extra_state(self) -> dict[str, str]:
        return {"auxiliary": self.auxiliary.digest if self.auxiliary else ""}

    def load_extra_state(self, state: dict[str, str]) -> None:
        if state != self.extra_state():
            raise UsageError(
                f"images: {FILE} was lost or the photographs have changed, and the auxiliary labels made now are not "
                "those that the run was started with; start anew with overwrite"
            )


def label_quality(views: LabelMapViews) -> dict:
    """Scores of the auxiliary labels on the pictures with labels, see hpseg.methods.lookbeyond.pair_quality."""
    photographs = views.photographs
    numbers = {path: number for number, path in enumerate(photographs.files)}
    quality = PairQuality(views.auxiliary.clusters, views.classes)
    for path, label in photographs.pairs:
        try:
            size = photographs.read(path).size
        except UnreadableImage:
            continue
        truth = read_truth(photographs.data, label, size, views.classes)
        cells = Image.fromarray(views.auxiliary[numbers[path]].astype("int32"))
        quality.add(cells.resize(size, Image.Resampling.NEAREST), truth)
    return quality.scores()


def _nearest(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels (B, S, S) at the centres of patches: (B, T)."""
    return F.interpolate(labels[:, None].double(), grid, mode="nearest-exact").long().flatten(1)
