"""Settings that belong to one method each; hpseg.run.config.Config has them all, beside those that methods share.

A method that needs some shared setting at one value says so in REQUIRED.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


def at_least(low: float, default: float) -> Any:
    """A setting of at least `low`."""
    return dataclasses.field(default=default, metadata={"bounds": (low, math.inf)})


def between(low: float, high: float, default: float) -> Any:
    """A setting in [low, high]."""
    return dataclasses.field(default=default, metadata={"bounds": (low, high)})


def fraction(default: float) -> Any:
    """A setting in [0, 1]."""
    return dataclasses.field(default=default, metadata={"bounds": (0, 1)})


def dropped(default: float) -> Any:
    """A rate of dropout, which leaves something: in [0, 0.99]."""
    return dataclasses.field(default=default, metadata={"bounds": (0, 0.99)})


def any_seed(default: int) -> Any:
    """An integer of 64 bits."""
    return dataclasses.field(default=default, metadata={"bounds": (-(2**63), 2**63 - 1)})


def percent(default: float) -> Any:
    """A setting in [0, 100]."""
    return dataclasses.field(default=default, metadata={"bounds": (0, 100)})


def whole_numbers(default: str) -> Any:
    """A setting of whole numbers above 0, as "1,2,4"; `numbers_of` reads it."""
    return dataclasses.field(default=default, metadata={"numbers": True})


def numbers_of(value: str) -> list[int]:
    """The numbers of a `whole_numbers` setting; ValueError for anything else."""
    numbers = [int(part) for part in value.split(",")]
    if min(numbers) < 1:
        raise ValueError(value)
    return numbers


@dataclass(frozen=True)
class HiddenPositivesSettings:
    """Hidden Positives (CVPR 2023, section 4.1 and released configurations)."""

    projection_lr: float = at_least(0, 5e-4)  # Adam
    cluster_lr: float = at_least(0, 5e-3)  # Adam, cluster probe; of STEGO, too
    negative_rate: float = fraction(0.02)  # share of the other patches in the denominator
    weighting: str = "pairs"  # "pairs", "anchors" or "separate", see hpkernels.hidden_positive_loss
    head_in_denominator: bool = False  # task-specific positives also in the denominator (published: not)
    lambda_warmup: int = at_least(0, 1000)  # steps before task-specific positives count, then a linear rise to 1
    local: bool = True  # the second stream: codes mixed over attended neighbours
    local_scale: float = at_least(0, 28.0)  # factor of that mixture: the published constant, made for 28 x 28 patches
    pool_size: int = at_least(1, 2048)  # rows of each reference pool
    pool_images: int = at_least(1, 2048)  # at most so many images fill a pool
    renew_interval: int = at_least(1, 100)  # steps between rebuilds of the task-specific pool


@dataclass(frozen=True)
class StegoSettings:
    """STEGO (ICLR 2022): weight and shift of the three correspondence terms, and what is compared."""

    self_weight: float = 0.1
    knn_weight: float = 1.0
    random_weight: float = 0.15
    self_shift: float = 0.12
    knn_shift: float = 0.2
    random_shift: float = 1.0
    neighbors: int = at_least(1, 7)  # a view's partner is one of so many nearest views
    negative_images: int = at_least(1, 5)  # random partners of a view
    feature_samples: int = at_least(1, 11)  # points per side of a view that are compared
    pointwise: bool = True  # centre feature similarities per point


@dataclass(frozen=True)
class DgclSettings:
    """DGCL (CVPR 2023, released code)."""

    supervised_share: float = fraction(1 / 80)  # of the steps, on labels alone; as many again with a copy as teacher
    unsupervised_weight: float = at_least(0, 0.5)
    contrast_weight: float = at_least(0, 0.5)
    entropy_drop: float = percent(20.0)  # of unlabelled pixels left out of self-training at first, falling to 0
    contrast_grad_scale: float = at_least(0, 1.0)  # of the contrast's gradient alone; as released on W GPUs, 1 / W
    contrast_drop: float = percent(80.0)  # of unlabelled features left out of the contrast at first, ...
    contrast_drop_end: float = percent(10.0)  # ... falling to this
    contrast_background: int = at_least(-1, 0)  # class without anchors; -1 for none
    contrast_by_class: bool = False  # begins with each full class of the bank; as released, once all are full
    bank_rows: int = at_least(1, 10_000)  # of a class
    bank_inserts: int = at_least(1, 1000)  # of a class and step
    anchors: int = at_least(1, 200)  # sparsest features of a class
    positives: int = at_least(1, 50)  # densest of the batch, and as many of the bank
    contrast_negatives: int = at_least(1, 512)
    ohem_pixels: int = at_least(0, 0)  # supervised loss of hard pixels only, at least so many; 0 takes all
    ohem_probability: float = fraction(0.7)  # of its class, up to which a pixel is hard


@dataclass(frozen=True)
class LookBeyondSettings:
    """Looking beyond single images (NeurIPS 2021): auxiliary labels, contrast, fine-tuning; the values are ours."""

    extractor: str | None = None  # network whose features are clustered: "embedded", or timm's name; None: `backbone`
    extractor_weights: str | None = None  # local checkpoint for it
    extractor_stride: int = at_least(0, 0)  # output stride of a convolutional one, in pixels; 0: its own
    extractor_size: int = at_least(0, 0)  # short side of the photographs that it sees, in pixels; 0: `size`
    auxiliary_clusters: int = between(2, 32_767, 100)  # K of k-means
    auxiliary_spherical: bool = True  # clusters by cosine; else by distance of unit rows
    auxiliary_iterations: int = at_least(1, 50)  # of Lloyd's algorithm on a sample of all features
    auxiliary_restarts: int = at_least(1, 1)  # of which the best is kept
    auxiliary_rows: int = at_least(1, 1 << 18)  # of that sample
    auxiliary_passes: int = at_least(0, 0)  # of Lloyd's algorithm over all features, from there
    outliers: float = between(0, 0.99, 0.05)  # share of the features that get no label, by distance to their centroid
    outlier_scope: str = "per_cluster"  # that share of each cluster, or "global": of all
    contrast_pixels: int = at_least(2, 4096)  # rows of the contrast, of one batch
    contrast_cap: int = at_least(1, 64)  # at most so many of one label in one picture
    contrast_form: str = "per_positive"  # or "supcon", see hpkernels.supervised_contrastive_loss
    cross_image_only: bool = False  # positives from other pictures only
    contrast_dim: int = at_least(1, 256)  # width of both layers of the projection head
    fine_tune_share: float = fraction(0.5)  # of the steps, the last ones, on labels alone; none without labels
    fine_tune_lr: float = at_least(0, 1e-3)  # of head and classifier then


@dataclass(frozen=True)
class Fs4Settings:
    """FS^4 (arXiv 2202.11981), after the published description: see docs/fs4.md."""

    pixel_weight: float = at_least(0, 1.0)  # of the clustering of patches; 0 leaves it out
    pixel_update: str = "epoch"  # patch clusters and labels are made anew every so many epochs, or "running" along
    pixel_epochs: int = at_least(1, 1)  # that many; with "running", after so many the counts are halved
    pixel_temperature: float = at_least(1e-3, 1.0)  # of the softmax over clusters
    pixel_balance: str = "size"  # weight of a cluster in the loss: its "size", its "inverse", or "none"
    pyramid_weight: float = at_least(0, 1.0)  # of the image and cell labels; 0 leaves them out
    pyramid_levels: str = whole_numbers("1,2,4")  # cells along a side of the view
    pyramid_clusters: str = whole_numbers("27,100,200")  # groups of cells of each level
    pyramid_epochs: int = at_least(0, 0)  # epochs between regroupings of the cells; 0 groups them once
    context_attention: bool = True  # the context-aware embedding, before the head
    context_dim: int = at_least(1, 128)  # of its queries, keys and values
    context_octaves: int = at_least(0, 4)  # of its encoding of positions and colours
    position_sigma: float = at_least(1e-2, 0.2)  # its reach at first, in short sides of the view
    colour_sigma: float = at_least(1e-2, 0.1)  # in RGB of [0, 1]


LEARN_FROM_LABELS = ("dgcl", "lookbeyond")  # methods that take `labeled`
TRAIN_BACKBONE = ("dgcl", "lookbeyond")  # methods that take `finetune`
JOINT_VIEWS = {"cache_features": False, "consistency_weight": 0.0, "crop": "random", "compile": False}
REQUIRED: dict[str, dict[str, Any]] = {
    "dgcl": {**JOINT_VIEWS, "clusters": "probe"},
    "lookbeyond": JOINT_VIEWS,
}
