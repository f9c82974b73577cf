"""What the modules on `hpkernels._cuda` share: names of dtypes, operands as the kernels take them, the launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hpkernels.ops.common import gpu

SUFFIX = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
TILE = 128  # rows and columns of a tile, csrc/cuda/common/tile.cuh

require_supported = functools.partial(gpu.require_supported, "cuda")


def whole_chunks(x: Tensor) -> Tensor:
    """Contiguous, its rows widened with zeros to whole 16-byte chunks, from an address at 16 bytes on."""
    return aligned(gpu.padded_rows(x, 16 // x.element_size()))


def aligned(x: Tensor) -> Tensor:
    """Contiguous, from an address at 16 bytes on: a view may begin between two chunks."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def launch(function: Callable[..., None], device: torch.device, *arguments: object) -> None:
    """Calls a function of `hpkernels._cuda` on the device and its current stream, which comes last."""
    if device.type != "cuda":  # the kernels compiled for the host, by the tests
        function(*arguments, 0)
        return
    with torch.cuda.device(device):
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)


def shares_of_columns(panels: int, columns: int, device: torch.device) -> int:
    """Shares of the columns, so that panels of rows fill the device twice; see `gpu.splits`."""
    return gpu.splits(panels, -(-columns // TILE), device)
