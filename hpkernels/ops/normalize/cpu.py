"""L2 normalisation of rows on the CPU: the pointer calls into `hpkernels._cpu`."""

import torch
from torch import Tensor

from hpkernels import _cpu
from hpkernels.ops.common.cpu import working


def normalize_rows(x: Tensor, name: str) -> Tensor:
    """x / ||x|| over the last dimension, in fp32 (fp64 for fp64); zero rows stay zero.

    Rows are scaled by their largest magnitude first, so norms do not overflow or vanish. Raises ValueError, naming the
    argument `name`, if x holds NaN or infinity.
    """
    x = working(x)
    y = torch.empty_like(x)
    if x.numel():
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        double = x.dtype == torch.float64
        if not _cpu.normalize_rows(double, x.data_ptr(), rows, width, y.data_ptr(), torch.get_num_threads()):
            raise ValueError(f"{name}: expected finite values, found non-finite ones (NaN or infinity)")
    return y


def normalize_rows_grad(grad_out: Tensor, x: Tensor) -> Tensor:
    """The gradient (g - (g . y) y) / ||x||, y = x / ||x||, in x's dtype; zero rows get zero."""
    dtype = x.dtype
    x = working(x)
    grad_out = grad_out.to(x.dtype).contiguous()
    grad_x = torch.empty_like(x)
    if x.numel():
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        _cpu.normalize_rows_grad(
            x.dtype == torch.float64, grad_out.data_ptr(), x.data_ptr(), rows, width, grad_x.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return grad_x.to(dtype)
