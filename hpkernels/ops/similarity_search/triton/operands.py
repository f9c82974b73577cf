"""What the searches multiply: rows of whole steps of the products, which start at 16 bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.common.gpu import common_dtype
from hpkernels.tuning import dtype_class

_STEP = {"half": 64, "single": 16}  # multiples of every BLOCK_K
_ALIGNMENT = 16  # bytes


def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, contiguous and widened with zeros, at least to one step; copies only where needed."""
    dtype = common_dtype(a, b)
    prepared = _whole_steps(a.to(dtype))
    return prepared, prepared if b is a else _whole_steps(b.to(dtype))


def _whole_steps(x: Tensor) -> Tensor:
    missing = -x.shape[1] % _STEP[dtype_class(x.dtype)] if x.shape[1] else _STEP[dtype_class(x.dtype)]
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
