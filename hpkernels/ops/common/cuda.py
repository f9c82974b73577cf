"""What the modules on `hpkernels._cuda` share: names of dtypes, operands as the kernels take them, the launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SUFFIX = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
TILE = 128  # rows and columns of a tile, csrc/cuda/common/tile.cuh


def require_supported(**tensors: Tensor | None) -> None:
    """TypeError, naming the argument, unless every tensor is fp16, bf16 or fp32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in SUFFIX:
            raise TypeError(
                f"{name}: the cuda backend takes float16, bfloat16 or float32, got {tensor.dtype}; "
                "backend='reference' takes float64"
            )


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of all, or fp32, to which each can be promoted exactly."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def whole_chunks(x: Tensor) -> Tensor:
    """Contiguous, its rows widened with zeros to whole 16-byte chunks, from an address at 16 bytes on."""
    missing = -x.shape[-1] % (16 // x.element_size())
    return aligned(torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous())


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


def processor_count(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shares_of_columns(panels: int, columns: int, device: torch.device) -> int:
    """Shares of the columns, so that panels of rows fill the device twice; depends on shapes and the device only."""
    return min(max(1, 2 * processor_count(device) // max(1, panels)), -(-columns // TILE))
