"""Contrastive statistics and their gradient on the CPU: the pointer calls into `hpkernels._cpu`."""

import torch
from torch import Tensor

from hpkernels import _cpu
from hpkernels.ops.common.cpu import kernel, working


class _Masks:
    """The masks as the kernels take them; keeps contiguous copies alive."""

    def __init__(self, positives, positives_t, extra, extra_t, negatives):
        masks = (positives, positives_t, extra, extra_t, negatives)
        self.tensors = [None if mask is None else mask.contiguous() for mask in masks]
        addresses = [0 if mask is None else mask.data_ptr() for mask in self.tensors]
        negative_rows = 1 if negatives is None else negatives.shape[0]
        self.native = _cpu.ContrastiveMasks(*addresses, positives.shape[1], negative_rows)


def contrastive_stats(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, pos, ext), each (S, n) fp32 (fp64 for fp64), of the anchors first_row + r, r < n; see reference.py."""
    x = working(x)
    streams, rows, depth = x.shape
    count = positives.shape[0]
    lse, pos, ext = (torch.zeros(streams, count, dtype=x.dtype) for _ in range(3))
    if lse.numel():
        masks = _Masks(positives, positives_t, extra, extra_t, negatives)
        kernel("contrastive_stats", x.dtype)(
            x.data_ptr(), streams, rows, depth, first_row, count, masks.native, denominator, temperature,
            lse.data_ptr(), pos.data_ptr(), ext.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return lse, pos, ext


def contrastive_grad(
    x: Tensor,
    positives: Tensor,
    positives_t: Tensor | None,
    extra: Tensor | None,
    extra_t: Tensor | None,
    negatives: Tensor | None,
    denominator: str,
    temperature: float,
    first_row: int,
    lse: Tensor,
    grad_lse: Tensor,
    grad_pos: Tensor,
    grad_ext: Tensor,
) -> Tensor:
    """The gradient (S, n, D) of the anchors' rows, in x's dtype; lse and row gradients are (S, N); see reference.py."""
    dtype = x.dtype
    x = working(x)
    streams, rows, depth = x.shape
    tables = [table.to(x.dtype).contiguous() for table in (lse, grad_lse, grad_pos, grad_ext)]
    count = positives.shape[0]
    grad_x = x.new_empty(streams, count, depth)
    if grad_x.numel():
        masks = _Masks(positives, positives_t, extra, extra_t, negatives)
        kernel("contrastive_grad", x.dtype)(
            x.data_ptr(), streams, rows, depth, first_row, count, masks.native, denominator, temperature,
            *(table.data_ptr() for table in tables), grad_x.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return grad_x.to(dtype)
