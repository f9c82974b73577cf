"""Sums of the rows that a mask chooses, a block of its rows at a time: what every backend but the reference runs.

On a CPU the pairs of a sparse mask are listed, and the rows of x gathered; each sum is made by one thread in the order
of the columns. Blocks of a dense one are unpacked and multiplied. So they are on a GPU, where the number of pairs, and
with it the length of their list, would have to be waited for.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.bits import list_pairs, unpack

_BLOCK_PAIRS = 1 << 22  # of the mask at a time, unpacked
LISTED_RATE = 0.03  # up to this density pairs are listed; measured break-even on a CPU (README.md)


def pair_sum(bits: Tensor, x: Tensor, counts: Tensor | None) -> Tensor:
    """sum_j B_ij x_j, (N, D), for the mask (N, words(M)) and x (M, D) in fp32 or fp64.

    counts: pairs of each row (N,) where they may be looked at, which is on a CPU.
    """
    out = x.new_empty(bits.shape[0], x.shape[1])
    if 0 in out.shape or x.shape[0] == 0:
        return out.zero_()
    x = x.contiguous()
    step = max(1, _BLOCK_PAIRS // x.shape[0])
    for first in range(0, len(bits), step):
        part = slice(first, first + step)
        if counts is not None and int(counts[part].sum()) <= LISTED_RATE * x.shape[0] * len(bits[part]):
            out[part] = _gathered(bits[part], x, counts[part])
        else:
            out[part] = _product(unpack(bits[part], x.shape[0]).to(x.dtype), x)
    return out


def _gathered(bits: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    _, columns = list_pairs(bits)
    ends = counts.long().cumsum(0)
    return torch.nn.functional.embedding_bag(columns, x, ends - counts, mode="sum")


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cpu and dispatch.MISSING["cpu"] is None:
        return importlib.import_module("hpkernels.ops.common.products").product(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
