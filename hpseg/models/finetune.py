"""`--finetune`: the backbone is trained, too, with a learning rate of its own.

A method that does so (hpseg.run.settings.methods.TRAIN_BACKBONE) takes a copy of it into its own parts in
`Method.adopt`: a `trainable` one, which runs with gradient, and as `self.backbone` the one that predicts, the same or
an average. Both are in state.pt; the weights of `self.backbone` are in model.safetensors, and `predicting` brings them
back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import Tensor

from hpseg.models.backbone import Backbone, fingerprint
from hpseg.run.config import Config
from hpseg.run.errors import UsageError

PREFIX = "backbone."  # of its tensors among those of the method


def trainable(backbone: Backbone, config: Config) -> Backbone:
    """A copy whose weights all take gradients. It stays in evaluation mode: neither dropout nor stochastic depth."""
    trained = copy.deepcopy(backbone).requires_grad_(True)
    trained.vit.set_grad_checkpointing(config.grad_checkpointing)
    return trained


def parameter_groups(backbone: Backbone, config: Config) -> list[dict[str, Any]]:
    """For an optimiser: `backbone_lr` for the last block and norm, times `layer_decay` for every block below and
    once more for the embeddings; norms and biases without weight decay."""
    groups = param_groups_layer_decay(backbone.vit, config.weight_decay, layer_decay=config.layer_decay)
    return [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr": config.backbone_lr * group["lr_scale"]}
        for group in groups
    ]


def predicting(backbone: Backbone, tensors: Mapping[str, Tensor], config: Config) -> Backbone:
    """The backbone that goes with trained tensors, named as in model.safetensors: itself if it was frozen, else a copy
    with the weights and the fingerprint of what was trained."""
    if not config.finetune:
        return backbone
    trained = copy.deepcopy(backbone)
    weights = {name.removeprefix(PREFIX): x for name, x in tensors.items() if name.startswith(PREFIX)}
    try:
        trained.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UsageError(f"backbone: {backbone.name!r} is not what the run trained ({str(error)[:300]})") from None
    trained.fingerprint = fingerprint(trained.vit)
    return trained.requires_grad_(False)
