"""What the searches multiply, rows of whole steps that start at 16 bytes, and the products of a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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


def descriptors(a: Tensor, b: Tensor, config: dict) -> tuple[TensorDescriptor, TensorDescriptor]:
    """What `products` copies tiles by, on GPUs with a unit that copies them without addresses in registers."""
    step = config["BLOCK_K"]
    return (
        TensorDescriptor.from_tensor(a, [config["BLOCK_M"], step]),
        TensorDescriptor.from_tensor(b, [config["BLOCK_N"], step]),
    )


@triton.jit
def products(
    a_ptr, b_ptr, a_tiles, b_tiles, first_a, first_b, rows_a, rows_b, C, stride_a, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N]: inner products of rows from first_a on with rows from first_b on; BLOCK_K divides C.

    Past the last row they are 0 with descriptors, and those of the rows `rows_*` without.
    """
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        if a_tiles is None:
            d = start + tl.arange(0, BLOCK_K)
            a = tl.load(a_ptr + rows_a.to(tl.int64)[:, None] * stride_a + d[None, :])
            b = tl.load(b_ptr + rows_b.to(tl.int64)[None, :] * stride_b + d[:, None])
        else:
            a = a_tiles.load([first_a, start])
            b = tl.trans(b_tiles.load([first_b, start]))
        s = tl.dot(a, b, s, input_precision=PRECISION)
    return s
