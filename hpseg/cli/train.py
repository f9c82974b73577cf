"""`hpseg train PHOTOS --out RUN --classes K`; every field of hpseg.run.config.Config is a flag."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from hpseg.run.config import CHOICES, Config
from hpseg.run.presets import PRESETS

HELP = {
    "classes": "clusters to find",
    "backbone": "'embedded' or any timm ViT, such as vit_small_patch8_224.dino",
    "root": "folder of the named data set",
    "weights": "local checkpoint for the backbone (timm or DINO key names); the papers' ViT-S/8 is "
    "dino_deitsmall8_300ep_pretrain.pth, timm's is another",
    "pos_embed": "position embedding off its own grid: as timm has it, or as DINO's code for published numbers",
    "preset": "settings to start from",
    "size": "side of the square training crop in pixels",
    "crop": "which part of a photograph is trained on",
    "resize": "how training pictures are brought to size: bilinear and antialiased, or nearest as published",
    "jitter": "of the picture, or of the normalised one, where it clamps, as published",
    "predict_size": "short side at prediction in pixels",
    "cache_features": "run the frozen backbone once per photograph and keep its features in RUN/features",
    "cache_dir": "keep them in this folder instead, which other runs may share",
    "cache_dtype": "of the features on the disk",
    "workers": "data loading processes, -1 picks",
    "labeled": "list of the pictures whose labels are trained on, or a share of them as 1/8",
    "finetune": "train the backbone, too",
    "backbone_lr": "learning rate of its last block, with --finetune",
    "layer_decay": "factor of that for every block below the last",
    "grad_checkpointing": "with --finetune: keep less for the gradient and compute it again",
    "contrast_by_class": "begin with each class whose part of the bank is full, where a rare one would hold up all",
    "steps": "optimiser steps",
    "batch_size": "photographs per step and process",
    "accumulate": "batches per step, their gradients averaged; each forms pairs among its own patches only, so that "
    "a larger --batch-size is another loss",
    "dtype": "bf16: autocast of backbone, heads and projection; the loss is computed in fp32 either way",
    "compile": "torch.compile of the backbone's blocks and of the heads",
    "dim": "width of the segmentation code",
    "lr": "learning rate of the segmentation head",
    "select_on_labels": "let labels choose the checkpoint: the best on this labelled folder or data set",
    "select_root": "folder of the named data set that selects",
    "select_every": "steps between scores on it",
    "preview_every": "steps between pictures of a few photographs' clusters in preview/, 0 for none",
    "strict": "stop at a picture that cannot be decoded, instead of passing it over",
    "profile": "time the stages of every step: log.csv, and a table at the end",
    "tensorboard": "write curves and previews for TensorBoard, too",
    "pixel_weight": "of the clustering of patches, 0 leaves it out",
    "pyramid_weight": "of the labels of whole views and cells, 0 leaves them out",
    "pyramid_levels": "cells along a side of a view, level by level",
    "pyramid_clusters": "groups of each level",
    "context_attention": "take in patches alike in features, place and colour before the head",
    "clusters": "final centroids: as trained, or k-means over the training codes",
}


def add_setting_flags(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ("images",)) -> None:
    """A flag per field of Config; a flag that is not given leaves the preset's value. Those of one method are a group
    of their own in the help."""
    groups = {
        name: group
        for settings in Config.__bases__
        for group in [parser.add_argument_group(settings.__doc__.split(":")[0].rstrip("."))]
        for name in settings.__dataclass_fields__
    }
    for field in dataclasses.fields(Config):
        if field.name in leave_out:
            continue
        flag, text = "--" + field.name.replace("_", "-"), HELP.get(field.name)
        if field.type == "bool":
            groups.get(field.name, parser).add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        choices = tuple(PRESETS) if field.name == "preset" else CHOICES.get(field.name)
        kind = {"int": int, "float": float}.get(str(field.type), str)
        groups.get(field.name, parser).add_argument(
            flag,
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            help=text,
            required=field.name == "classes",
            metavar=None if choices else str(field.type).split()[0].upper(),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", help="folder of photographs, searched recursively, or the name of a data set")
    parser.add_argument("--out", required=True, help="folder for the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_setting_flags(parser)


def run(args: argparse.Namespace) -> None:
    from hpseg.training.loop import train

    train(**vars(args))
