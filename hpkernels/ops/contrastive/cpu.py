"""Contrastive statistics and their gradient on the CPU: the pointer calls into `hpkernels._cpu`."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import _cpu
from hpkernels.ops.common.cpu import kernel, working
from hpkernels.ops.contrastive.masks import Masks


def _native(masks: Masks) -> _cpu.ContrastiveMasks:
    """Contiguous masks as the kernels take them; the memory is the tensors'."""
    return _cpu.ContrastiveMasks(*masks.addresses(), masks.positives.shape[1], masks.period(1))


def contrastive_stats(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, pos, ext), each (S, n) fp32 (fp64 for fp64), of the n anchors of the masks; see reference.py."""
    x, masks = working(x), masks.map(Tensor.contiguous)
    streams, rows, depth = x.shape
    count = masks.anchors
    lse, pos, ext = (torch.zeros(streams, count, dtype=x.dtype) for _ in range(3))
    if lse.numel():
        kernel("contrastive_stats", x.dtype)(
            x.data_ptr(), streams, rows, depth, masks.first_row, count, _native(masks), masks.denominator, temperature,
            lse.data_ptr(), pos.data_ptr(), ext.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return lse, pos, ext


def contrastive_grad(
    x: Tensor, masks: Masks, temperature: float, lse: Tensor, grad_lse: Tensor, grad_pos: Tensor, grad_ext: Tensor
) -> Tensor:
    """The gradient (S, n, D) of the anchors' rows, in x's dtype; lse and row gradients are (S, N); see reference.py."""
    dtype = x.dtype
    x, masks = working(x), masks.map(Tensor.contiguous)
    streams, rows, depth = x.shape
    tables = [table.to(x.dtype).contiguous() for table in (lse, grad_lse, grad_pos, grad_ext)]
    count = masks.anchors
    grad_x = x.new_empty(streams, count, depth)
    if grad_x.numel():
        kernel("contrastive_grad", x.dtype)(
            x.data_ptr(), streams, rows, depth, masks.first_row, count, _native(masks), masks.denominator, temperature,
            *(table.data_ptr() for table in tables), grad_x.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return grad_x.to(dtype)
