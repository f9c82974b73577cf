"""`--compile`: torch.compile where a training step spends its time and nothing but tensors flows."""

from __future__ import annotations

import torch
from torch import nn

from hpseg.models.backbone import Backbone
from hpseg.models.heads import SegmentationHead
from hpseg.run.errors import UsageError


def require_compiler(device: torch.device) -> None:
    """Compiles and runs a line for the device; what fails there is an error that says so."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(16, device=device))
    except Exception as error:  # of dynamo, inductor, Triton or the compiler that inductor calls
        raise UsageError(
            f"compile: torch {torch.__version__} cannot compile for {device} here ({str(error).splitlines()[0]}); "
            "install what it lacks (a C++ compiler, for a GPU Triton, too), or pass --no-compile"
        ) from None


def compile_parts(backbone: Backbone, method: nn.Module) -> None:
    """Compiles the blocks of the backbone, which share one compilation, and the heads of the method, all in place.

    Left as they are: the last block's attention, whose products `Backbone` watches from Python, the losses, whose
    kernels are compiled already, and everything that draws random numbers. Compiled anew is once per grad mode and
    kind of shape, never per step.
    """
    *blocks, last = backbone.vit.blocks
    for part in (*blocks, last.mlp):
        part.compile()
    for module in method.modules():
        if isinstance(module, SegmentationHead):
            module.codes = torch.compile(module.codes, dynamic=True)  # batches of pools differ in size
