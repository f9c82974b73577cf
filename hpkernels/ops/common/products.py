"""Matrix products on `hpkernels._cpu`: torch's own round by the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.common.cpu import kernel


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of CPU matrices of one dtype, fp32 or fp64; every element is summed in one order, for any thread count."""
    (a_data, *a_layout), (b_data, *b_layout) = _factor(a), _factor(b)
    out = a.new_empty(a.shape[0], b.shape[1])
    if out.numel():
        kernel("product", a.dtype)(
            a_data.data_ptr(), *a_layout, b_data.data_ptr(), *b_layout, *out.shape, a.shape[1], out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def _factor(x: Tensor) -> tuple[Tensor, int, bool]:
    """Memory that lives as long as the tensor, how far apart its rows are, and whether these are x's columns."""
    if x.stride(1) == 1:
        return x, x.stride(0), False
    if x.stride(0) == 1:
        return x, x.stride(1), True
    return x.contiguous(), x.shape[1], False
