"""Contrastive statistics and their gradient on the CPU: the pointer calls into `hpkernels._cpu`."""

import torch
from torch import Tensor

from hpkernels import _cpu


def _working(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def _kernel(name: str, dtype: torch.dtype):
    return getattr(_cpu, f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")


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
    x = _working(x)
    streams, rows, depth = x.shape
    count = positives.shape[0]
    lse, pos, ext = (torch.zeros(streams, count, dtype=x.dtype) for _ in range(3))
    if lse.numel():
        masks = _Masks(positives, positives_t, extra, extra_t, negatives)
        _kernel("contrastive_stats", x.dtype)(
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
    x = _working(x)
    streams, rows, depth = x.shape
    tables = [table.to(x.dtype).contiguous() for table in (lse, grad_lse, grad_pos, grad_ext)]
    count = positives.shape[0]
    grad_x = x.new_empty(streams, count, depth)
    if grad_x.numel():
        masks = _Masks(positives, positives_t, extra, extra_t, negatives)
        _kernel("contrastive_grad", x.dtype)(
            x.data_ptr(), streams, rows, depth, first_row, count, masks.native, denominator, temperature,
            *(table.data_ptr() for table in tables), grad_x.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return grad_x.to(dtype)


def _with_keys(
    x: Tensor, groups: Tensor, keys: Tensor | None, key_groups: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, their numbers as anchors and as columns: with keys the rows of x, then those of the keys."""
    x, groups = _working(x), groups.to(torch.int32).contiguous()
    if keys is None:
        return x, groups, groups
    key_groups = key_groups.to(torch.int32)
    no_anchors, no_columns = torch.full_like(key_groups, -1), torch.full_like(groups, -1)
    return torch.cat([x, keys.to(x.dtype)]), torch.cat([groups, no_anchors]), torch.cat([no_columns, key_groups])


def group_lse(
    x: Tensor, groups: Tensor, keys: Tensor | None, key_groups: Tensor | None, temperature: float
) -> Tensor:
    """(N,) fp32 (fp64 for fp64); see reference.py."""
    count = x.shape[0]
    rows, query, key = _with_keys(x, groups, keys, key_groups)
    lse = rows.new_zeros(count)
    if count:
        _kernel("contrastive_group_lse", rows.dtype)(
            rows.data_ptr(), rows.shape[0], rows.shape[1], 0, count, query.data_ptr(), key.data_ptr(), temperature,
            lse.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return lse


def group_lse_grad(
    x: Tensor,
    groups: Tensor,
    keys: Tensor | None,
    key_groups: Tensor | None,
    temperature: float,
    lse: Tensor,
    grad_lse: Tensor,
    of_keys: bool,
) -> Tensor:
    """The gradient (N, D) of x, or (M, D) of the keys, in its dtype; see reference.py."""
    dtype = keys.dtype if of_keys else x.dtype
    rows, query, key = _with_keys(x, groups, keys, key_groups)
    missing = rows.shape[0] - x.shape[0]
    tables = (torch.nn.functional.pad(table.to(rows.dtype), (0, missing)) for table in (lse, grad_lse))
    lse, grad_lse = (table.contiguous() for table in tables)
    first, count = (x.shape[0], missing) if of_keys else (0, x.shape[0])
    grad = rows.new_empty(count, rows.shape[1])
    if grad.numel():
        zeros = torch.zeros_like(lse)
        _kernel("contrastive_group_grad", rows.dtype)(
            rows.data_ptr(), rows.shape[0], rows.shape[1], first, count, query.data_ptr(), key.data_ptr(), temperature,
            lse.data_ptr(), grad_lse.data_ptr(), zeros.data_ptr(), grad.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return grad.to(dtype)
