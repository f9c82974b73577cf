"""Settings that methods share, by theme."""

from __future__ import annotations

from dataclasses import dataclass

from hpseg.run.presets import METHOD_PRESETS
from hpseg.run.settings.declaration import setting
from hpseg.run.settings.methods import LEARN_FROM_LABELS, TRAIN_BACKBONE


@dataclass(frozen=True)
class RunSettings:
    """What is trained, and on what."""

    images: str = setting(
        "folder of photographs, searched recursively, or the name of a data set", "", basic=True, required=True
    )
    root: str | None = setting("folder of the named data set", None, basic=True)
    method: str = setting("published method to train", "hp", choices=tuple(METHOD_PRESETS), basic=True)
    classes: int = setting("clusters to find, at most 255", 27, low=2, basic=True, required=True)
    preset: str = setting("settings to start from, which every other flag overrides", "small", basic=True)
    backbone: str = setting(
        "'embedded', the small ViT in this package, which has seen labels indirectly; 'embedded-selfsup', one that has "
        "seen none; or any timm ViT, such as vit_small_patch8_224.dino",
        "embedded",
        basic=True,
    )
    weights: str | None = setting(
        "local checkpoint for the backbone (timm or DINO key names); the papers' ViT-S/8 is "
        "dino_deitsmall8_300ep_pretrain.pth, timm's is another",
        None,
        basic=True,
    )
    dtype: str = setting(
        "bf16: autocast of backbone, heads and projection, and the default of loss_dtype; faster on a GPU",
        "fp32",
        choices=("fp32", "bf16"),
        basic=True,
    )
    loss_dtype: str = setting(
        "type of the codes and features that losses and searches over pairs take, whose sums are fp32; follows --dtype",
        "fp32",
        choices=("fp32", "bf16"),
    )
    pos_embed: str = setting(
        "position embedding off its own grid: as timm has it, or as DINO's code for published numbers",
        "timm",
        choices=("timm", "dino"),
    )
    seed: int = setting("seed of all random choices", 0, low=-(2**63), high=2**63 - 1, basic=True)


@dataclass(frozen=True)
class BackboneTraining:
    """Training the backbone, too."""

    finetune: bool = setting("train the backbone, too", False, methods=TRAIN_BACKBONE, basic=True)
    backbone_lr: float = setting(
        "learning rate of the backbone's last block; DGCL publishes 0.001 for VOC, 0.01 for Cityscapes",
        1e-4,
        low=0,
        methods=TRAIN_BACKBONE,
    )
    layer_decay: float = setting(
        "factor of the learning rate for every block below the last", 1.0, low=0, high=1, methods=TRAIN_BACKBONE
    )


@dataclass(frozen=True)
class PictureSettings:
    """Pictures."""

    size: int = setting("side of the square training crop in pixels, rounded to whole patches", 224, low=16, basic=True)
    crop: str = setting(
        "which part of a photograph is trained on; five: half-size corner and centre crops, as in the published runs",
        "center",
        choices=("center", "random", "five"),
    )
    resize: str = setting(
        "how training pictures are brought to size: bilinear and antialiased, or nearest as published",
        "bilinear",
        choices=("bilinear", "nearest"),
    )
    jitter: str = setting(
        "photometric jitter of the picture, or of the normalised one, where it clamps, as published",
        "image",
        choices=("image", "normalized"),
    )
    predict_size: int = setting("short side of a picture at prediction, in pixels", 320, low=16, basic=True)
    cache_features: bool = setting(
        "run the frozen backbone once per photograph and keep its features in RUN/features; crops are windows of them",
        False,
        methods=("hp", "stego", "fs4"),
        basic=True,
    )
    cache_dtype: str = setting("type of the features on the disk", "fp32", choices=("fp32", "bf16"))


@dataclass(frozen=True)
class OptimisationSettings:
    """Optimisation."""

    steps: int = setting("optimiser steps", 1000, low=1, basic=True)
    # config.json of a run has the photographs of all ranks together.
    batch_size: int = setting(
        "photographs per step and process; Hidden Positives publishes 64, STEGO 32 or 16", 8, low=1, basic=True
    )
    accumulate: int = setting(
        "batches per step, their gradients averaged; each forms pairs among its own patches only, so that a larger "
        "--batch-size is another loss",
        1,
        low=1,
    )
    lr: float = setting(
        "learning rate of the segmentation head; 0.0005 as published for Hidden Positives and STEGO",
        5e-4,
        low=0,
        basic=True,
    )
    weight_decay: float = setting("weight decay of the segmentation head, and of a trained backbone", 0.1, low=0)
    clip_norm: float = setting(
        "largest norm of the gradient of head and trained backbone together; 0 does not clip", 10.0, low=0
    )


@dataclass(frozen=True)
class HeadSettings:
    """Head and loss, as far as methods share them."""

    dim: int = setting("width of the segmentation code; Hidden Positives publishes 512, STEGO 70 to 100", 512, low=1)
    dropout: float = setting("rate of channel dropout at the inputs of the head", 0.1, low=0, high=0.99)
    mining_dropout: float = setting(
        "rate of channel dropout of the features and codes that choose pairs",
        0.1,
        low=0,
        high=0.99,
        methods=("hp", "stego"),
    )
    temperature: float = setting(
        "temperature of the contrast; Hidden Positives publishes 0.8, 0.6, 0.4 for COCO-Stuff, Cityscapes, Potsdam",
        0.8,
        above=0,
        methods=("hp", "dgcl", "lookbeyond"),
    )
    ema_momentum: float = setting(
        "momentum of the averaged head or teacher; a larger one follows more slowly",
        0.99,
        low=0,
        high=1,
        methods=("hp", "dgcl"),
    )
    consistency_weight: float = setting(
        "weight of the photometrically jittered view; 0 leaves it out", 0.05, low=0, methods=("hp", "fs4")
    )
    clusters: str = setting(
        "final centroids, unless labels are learned: as trained, or k-means over the training codes",
        "probe",
        choices=("probe", "kmeans"),
    )


@dataclass(frozen=True)
class LabelSettings:
    """Labels, which nothing looks at unless asked to."""

    labeled: str | None = setting(
        "list of the pictures whose labels are trained on, or a share of them as 1/8",
        None,
        methods=LEARN_FROM_LABELS,
        basic=True,
    )
    select_on_labels: str | None = setting(
        "let labels choose the checkpoint: the best on this labelled folder or data set", None, basic=True
    )
    select_root: str | None = setting("folder of the named data set that selects, if it is not --root", None)
    select_every: int = setting("steps between scores of checkpoints on those labels", 100, low=1)


@dataclass(frozen=True)
class MachineSettings:
    """Machine, saving and looking; these may differ between a run and its resumption."""

    workers: int = setting("data loading processes; -1 picks by the number of processors", -1, low=-1, basic=True)
    device: str = setting("where to compute: auto, cpu, cuda, or one GPU of several as cuda:1", "auto", basic=True)
    save_every: int = setting("steps between checkpoints", 100, low=1)
    cache_dir: str | None = setting("folder for cached features that runs may share, instead of RUN/features", None)
    preview_every: int = setting(
        "steps between pictures of a few photographs' clusters in RUN/preview; 0 makes none", 200, low=0, basic=True
    )
    profile: bool = setting("time the stages of every step: in log.csv, and as a table at the end", False)
    strict: bool = setting("stop at a picture that cannot be decoded, instead of passing it over", False)
    tensorboard: bool = setting("write curves and previews for TensorBoard, too", False)
    compile: bool = setting("torch.compile the blocks of the backbone and the heads", False)
    grad_checkpointing: bool = setting(
        "with --finetune: keep less for the gradient, and run the backbone forward once more",
        False,
        methods=TRAIN_BACKBONE,
    )


SHARED = (
    *(RunSettings, BackboneTraining, PictureSettings, OptimisationSettings),
    *(HeadSettings, LabelSettings, MachineSettings),
)
