"""Settings that belong to one method each.

A method that needs some shared setting at one value says so in REQUIRED.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpseg.run.settings.declaration import setting


@dataclass(frozen=True)
class HiddenPositivesSettings:
    """Hidden Positives (CVPR 2023, section 4.1 and released configurations)."""

    projection_lr: float = setting("learning rate of the projection, by Adam", 5e-4, low=0)
    cluster_lr: float = setting("learning rate of the cluster probe, by Adam; of STEGO's, too", 5e-3, low=0)
    negative_rate: float = setting(
        "share of the other patches in the denominator; published 0.02, and 1 for Potsdam", 0.02, low=0, high=1
    )
    weighting: str = setting(
        "how anchors count: by their pairs as published, each the same, or each kind of positive apart "
        "(hpkernels.hidden_positive_loss)",
        "pairs",
        choices=("pairs", "anchors", "separate"),
    )
    head_in_denominator: bool = setting("put task-specific positives in the denominator, too; published without", False)
    lambda_warmup: int = setting(
        "steps before task-specific positives count; from there their weight rises to 1 at the last step", 1000, low=0
    )
    local: bool = setting("train the second stream, too: codes mixed over attended neighbours", True)
    local_scale: float = setting("factor of that mixture; the published 28 was made for 28 x 28 patches", 28.0, low=0)
    pool_size: int = setting("patches in each reference pool; published 2048, for Potsdam 1024", 2048, low=1)
    pool_images: int = setting("largest number of photographs that fill a pool", 2048, low=1)
    renew_interval: int = setting(
        "steps between new task-specific pools; published 100 for COCO-Stuff, else 20", 100, low=1
    )


@dataclass(frozen=True)
class StegoSettings:
    """STEGO (ICLR 2022)."""

    self_weight: float = setting("weight of the term of a view with itself", 0.1)
    knn_weight: float = setting("weight of the term of a view with one of its nearest", 1.0)
    random_weight: float = setting("weight of the term of a view with random others", 0.15)
    shifts: str = setting(
        "what the three shifts are: similarities, or quantiles (0 to 1) of the similarities of the features at hand",
        "similarities",
        choices=("similarities", "quantiles"),
    )
    self_shift: float = setting("similarity of features above which codes are pulled together, within a view", 0.12)
    knn_shift: float = setting(
        "similarity of features above which codes are pulled together, between a view and one of its nearest", 0.2
    )
    random_shift: float = setting(
        "similarity of features above which codes are pulled together, between a view and random others", 1.0
    )
    neighbors: int = setting("nearest views that a view's partner is drawn from; published 7", 7, low=1)
    negative_images: int = setting("random partners of a view; published 5", 5, low=1)
    feature_samples: int = setting("points per side of a view that are compared; published 11", 11, low=1)
    pointwise: bool = setting("centre the similarities of features per point; published so but for Cityscapes", True)


@dataclass(frozen=True)
class DgclSettings:
    """DGCL (CVPR 2023, released code)."""

    supervised_share: float = setting(
        "share of the steps that train on labels alone; as many again have a copy of the student as teacher; "
        "published 1/80, for Cityscapes 1/20",
        1 / 80,
        low=0,
        high=1,
    )
    unsupervised_weight: float = setting("weight of self-training; published 0.5", 0.5, low=0)
    contrast_weight: float = setting("weight of the contrast; published 0.5", 0.5, low=0)
    entropy_drop: float = setting(
        "percent of the unlabelled pixels, the least certain, that self-training leaves out at first; falls to 0",
        20.0,
        low=0,
        high=100,
    )
    contrast_grad_scale: float = setting(
        "factor of the contrast's gradient alone; the released code on W GPUs has 1 / W", 1.0, low=0
    )
    contrast_drop: float = setting(
        "percent of the unlabelled features, the least certain, that the contrast leaves out at first",
        80.0,
        low=0,
        high=100,
    )
    contrast_drop_end: float = setting(
        "percent of them that the contrast leaves out at the last step", 10.0, low=0, high=100
    )
    contrast_background: int = setting(
        "class without anchors, -1 for none; published 0, the background of VOC", 0, low=-1
    )
    contrast_by_class: bool = setting(
        "begin with each class whose part of the bank is full, where a rare one would hold up all", False
    )
    bank_rows: int = setting("features of a class in the bank", 10_000, low=1)
    bank_inserts: int = setting("features of a class that enter the bank per step", 1000, low=1)
    anchors: int = setting("anchors of a class, its sparsest features", 200, low=1)
    positives: int = setting(
        "densest features of a class, of the batch and as many of the bank, whose mean attracts the anchors",
        50,
        low=1,
    )
    contrast_negatives: int = setting("random features of other classes for an anchor", 512, low=1)
    ohem_pixels: int = setting(
        "learn the hard labelled pixels only, and at least so many; 0 learns all; published 100,000 for Cityscapes",
        0,
        low=0,
    )
    ohem_probability: float = setting(
        "probability of its class up to which a pixel is hard; published 0.7", 0.7, low=0, high=1
    )


@dataclass(frozen=True)
class LookBeyondSettings:
    """Looking beyond single images (NeurIPS 2021): auxiliary labels, contrast, fine-tuning; the values are ours."""

    extractor: str | None = setting(
        "network whose features are clustered: 'embedded', or timm's name; without it the backbone", None
    )
    extractor_weights: str | None = setting("local checkpoint for the extractor", None)
    extractor_stride: int = setting("output stride of a convolutional extractor in pixels; 0: its own", 0, low=0)
    extractor_size: int = setting(
        "short side of the photographs that the extractor sees, in pixels; 0: as --size", 0, low=0
    )
    auxiliary_clusters: int = setting("clusters of features, each an auxiliary label", 100, low=2, high=32_767)
    auxiliary_spherical: bool = setting("cluster by cosine, else by distance of unit vectors", True)
    auxiliary_iterations: int = setting("iterations of Lloyd's algorithm on a sample of all features", 50, low=1)
    auxiliary_restarts: int = setting("times that k-means starts anew; the best is kept", 1, low=1)
    auxiliary_rows: int = setting("features in the sample that k-means sees", 1 << 18, low=1)
    auxiliary_passes: int = setting("passes of Lloyd's algorithm over all features, after the sample", 0, low=0)
    outliers: float = setting(
        "share of the features, the farthest from their centroid, that get no label", 0.05, low=0, high=0.99
    )
    outlier_scope: str = setting(
        "take that share of each cluster, or of all features", "per_cluster", choices=("per_cluster", "global")
    )
    contrast_pixels: int = setting("patches of a batch in the contrast", 4096, low=2)
    contrast_cap: int = setting("largest number of patches of one label in one picture", 64, low=1)
    contrast_form: str = setting(
        "each positive against the negatives, or the supervised contrastive loss "
        "(hpkernels.supervised_contrastive_loss)",
        "per_positive",
        choices=("per_positive", "supcon"),
    )
    cross_image_only: bool = setting("take positives from other pictures only", False)
    contrast_dim: int = setting("width of both layers of the projection head", 256, low=1)
    fine_tune_share: float = setting(
        "share of the steps, the last ones, that train on labels alone; none without labels", 0.5, low=0, high=1
    )
    fine_tune_lr: float = setting("learning rate of head and classifier in those steps", 1e-3, low=0)


@dataclass(frozen=True)
class Fs4Settings:
    """FS^4 (arXiv 2202.11981), after the published description."""

    pixel_weight: float = setting("weight of the clustering of patches; 0 leaves it out", 1.0, low=0)
    pixel_update: str = setting(
        "make patch clusters anew by epochs, or let them run along with every step",
        "epoch",
        choices=("epoch", "running"),
    )
    pixel_epochs: int = setting(
        "epochs between new patch clusters; with running ones, between halvings of their counts", 1, low=1
    )
    pixel_temperature: float = setting("temperature of the softmax over patch clusters", 1.0, low=1e-3)
    pixel_balance: str = setting(
        "weight of a patch cluster in the loss: its size, the inverse, or all the same",
        "size",
        choices=("size", "inverse", "none"),
    )
    pyramid_weight: float = setting("weight of the labels of views and cells; 0 leaves them out", 1.0, low=0)
    pyramid_levels: str = setting("cells along a side of a view, level by level", "1,2,4", numbers=True)
    pyramid_clusters: str = setting("groups of the cells of each level", "27,100,200", numbers=True)
    pyramid_epochs: int = setting("epochs between new groups of cells; 0 groups them once", 0, low=0)
    context_attention: bool = setting("take in patches alike in features, place and colour before the head", True)
    context_dim: int = setting("width of the queries, keys and values of that attention", 128, low=1)
    context_octaves: int = setting("octaves of sine and cosine that encode positions and colours", 4, low=0)
    position_sigma: float = setting(
        "reach of that attention in place at first, in short sides of the view", 0.2, low=1e-2
    )
    colour_sigma: float = setting("reach of that attention in colour at first, in RGB of [0, 1]", 0.1, low=1e-2)


OF_METHOD = {
    "hp": HiddenPositivesSettings,
    "stego": StegoSettings,
    "dgcl": DgclSettings,
    "lookbeyond": LookBeyondSettings,
    "fs4": Fs4Settings,
}
LEARN_FROM_LABELS = ("dgcl", "lookbeyond")  # methods that take `labeled`
TRAIN_BACKBONE = ("dgcl", "lookbeyond")  # methods that take `finetune`
JOINT_VIEWS = {"cache_features": False, "consistency_weight": 0.0, "crop": "random", "compile": False}
REQUIRED: dict[str, dict[str, Any]] = {
    "dgcl": {**JOINT_VIEWS, "clusters": "probe"},
    "lookbeyond": JOINT_VIEWS,
}
