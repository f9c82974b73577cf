"""What the modules on a GPU share, whether their kernels are Triton's or CUDA C++: dtypes, shapes, ordered keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = math.log2(math.e)
_MINUS_INFINITY = -2139095041  # the upper half of the ordered key of -inf


def require_supported(backend: str, /, **tensors: Tensor | None) -> None:
    """TypeError, naming the argument, unless every tensor is fp16, bf16 or fp32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}: the {backend} backend takes float16, bfloat16 or float32, got {tensor.dtype}; "
                "backend='reference' takes float64"
            )


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of all, or fp32, to which each can be promoted exactly."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def padded_rows(x: Tensor, multiple: int) -> Tensor:
    """Rows widened with zeros to a multiple of `multiple` (a copy, only where needed).

    Inner products do not change, the kernels' loads along a row need no mask, and every row starts at 16 bytes.
    """
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def tf32_accepted() -> bool:
    """Whether the user accepts TF32 in matrix products of fp32 tensors."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def ieee_requested() -> bool:
    """Whether the user asks for IEEE products of fp32 tensors: torch.backends.cuda.matmul.fp32_precision = "ieee"."""
    return torch.backends.cuda.matmul.fp32_precision == "ieee"


def processor_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for CPU tensors, under the interpreter or on the shim: no reason to split work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits(panels: int, tiles: int, device: torch.device) -> int:
    """Parts of a loop over `tiles` of columns, so that `panels` of rows fill the device twice.

    Depends on shapes and the device only; every part has at least one tile.
    """
    return min(max(1, 2 * processor_count(device) // max(1, panels)), tiles)


def decode_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 values and int64 indices of ordered keys (csrc/shared/ordered_key.h); -inf and -1 for empty keys and for
    values of -inf."""
    ordered = keys >> 32
    bits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(torch.int32)
    missing = ordered <= _MINUS_INFINITY
    values = torch.where(missing, -torch.inf, bits.view(torch.float32))
    return values, torch.where(missing, -1, 0xFFFFFFFF - (keys & 0xFFFFFFFF))
