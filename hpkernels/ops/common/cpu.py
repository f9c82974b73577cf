"""What the modules on `hpkernels._cpu` share: the dtype that they compute in, and the functions for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpkernels import _cpu


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if one of the tensors is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def working(x: Tensor) -> Tensor:
    """x in its working dtype, contiguous."""
    return x.to(working_dtype(x)).contiguous()


def kernel(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The function of `hpkernels._cpu` for a working dtype."""
    return getattr(_cpu, f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")
