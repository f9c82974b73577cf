"""Everything that a run has before its first step, as one object with named parts."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hpseg.data.folder import PhotoFolder, hash_seed
from hpseg.features.tokens import Encoder
from hpseg.methods.base import Method, Source, method_class
from hpseg.models.backbone import Backbone, load_backbone
from hpseg.models.weights import note_on
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import Ranks
from hpseg.training.compiled import compile_parts, require_compiler
from hpseg.training.report import tensorboard_writer

if TYPE_CHECKING:
    from hpseg.training.selection import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run trains on, which is found before there is a run folder."""

    config: Config  # batch_size is that of all ranks together
    out: Path
    device: torch.device
    ranks: Ranks
    selection: Selection | None
    backbone: Backbone
    dataset: PhotoFolder
    encoder: Encoder
    batch_size: int  # as in config, or all photographs if they are fewer


@dataclass(frozen=True)
class Setup(Inputs):
    """That, and what trains. `source` has the two random generators."""

    method: Method
    optimizers: dict[str, torch.optim.Optimizer]
    source: Source
    pictures: int  # hash of the names of all photographs


def find_inputs(config: Config, out: Path, device: torch.device, ranks: Ranks) -> Inputs:
    """What can be found to be wrong with the settings, the photographs or the machine is a UsageError now."""
    with ranks.agree():
        selection = None
        if config.select_on_labels is not None:
            from hpseg.training.selection import Selection

            selection = Selection(config, ranks)
        if config.tensorboard:
            tensorboard_writer()  # before there is a run folder
        if config.compile:
            require_compiler(device)
        backbone = load_backbone(config.backbone, config.weights, dtype=config.dtype, pos_embed=config.pos_embed)
        backbone = backbone.to(device)
        dataset = method_class(config.method).open_photographs(config, backbone)
        encoder = Encoder(backbone, dataset, config, device, out)
        batch_size = min(config.batch_size, len(dataset))
        for name, rows in (("images", batch_size), ("pool_size", config.pool_size)):
            if rows < ranks.size:
                raise UsageError(f"{name}: expected at least one for each of {ranks.size} ranks, got {rows}")
    held = ranks.collect((len(dataset.files), backbone.fingerprint))
    if len(set(held)) > 1:
        raise UsageError(f"images, weights: expected the same on every rank, got (files, hash of the backbone) {held}")
    return Inputs(config, out, device, ranks, selection, backbone, dataset, encoder, batch_size)


def set_up(inputs: Inputs, quiet: bool) -> Setup:
    """Says what will be trained, makes the cached features that are missing, and the method with fresh weights."""
    config, ranks, backbone, encoder = inputs.config, inputs.ranks, inputs.backbone, inputs.encoder
    files, size = inputs.dataset.files, inputs.dataset.size
    logger.info(
        f"{len(files)} photographs, {config.classes} classes, {config.backbone} on {inputs.device}, "
        f"batches of {inputs.batch_size} at {size} x {size} pixels"
        + (f" on {ranks.size} ranks" if ranks.size > 1 else "")
    )
    if (note := note_on(backbone.source)) and not quiet:
        logger.warning(f"backbone: {note}")
    encoder.fill(ranks)

    # Random numbers come from these two generators only, so that their states are all there is to save.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_seed("init", config.seed))
        method = method_class(config.method)(backbone.channels, config).to(inputs.device)
        if config.finetune:
            method.adopt(backbone)
            encoder.backbone = method.backbone
    dropout_rng = torch.Generator(inputs.device).manual_seed(hash_seed("dropout", config.seed))
    pool_rng = torch.Generator().manual_seed(hash_seed("pools", config.seed))
    optimizers = method.optimizers()
    if config.compile:
        compile_parts(encoder.backbone, method)
    source = Source(encoder, ranks, inputs.batch_size, dropout_rng, pool_rng, inputs.out)
    method.prepare(source)
    folder = config.root or config.images
    pictures = hash_seed("pictures", *sorted(os.path.relpath(path, folder) for path in files))
    return Setup(**vars(inputs), method=method, optimizers=optimizers, source=source, pictures=pictures)
