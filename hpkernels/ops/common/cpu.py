"""What the modules on `hpkernels._cpu` share."""

import torch
from torch import Tensor

from hpkernels import _cpu


def working(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def kernel(name: str, dtype: torch.dtype):
    return getattr(_cpu, f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")
