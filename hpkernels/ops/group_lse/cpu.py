"""The log-sum-exp over other groups and its gradient on the CPU: the pointer calls into `hpkernels._cpu`."""

import torch
from torch import Tensor

from hpkernels.ops.common.cpu import kernel, working
from hpkernels.ops.group_lse.rows import Grouped


def _with_keys(rows: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, their numbers as anchors and as columns: with keys the rows of x, then those of the keys."""
    x, groups, keys, key_groups = rows
    x, groups = working(x), groups.to(torch.int32).contiguous()
    if keys is None:
        return x, groups, groups
    key_groups = key_groups.to(torch.int32)
    no_anchors, no_columns = torch.full_like(key_groups, -1), torch.full_like(groups, -1)
    return torch.cat([x, keys.to(x.dtype)]), torch.cat([groups, no_anchors]), torch.cat([no_columns, key_groups])


def group_lse(rows: Grouped, temperature: float) -> Tensor:
    """(N,) fp32 (fp64 for fp64); see reference.py."""
    count = len(rows.x)
    x, query, key = _with_keys(rows)
    lse = x.new_zeros(count)
    if count:
        kernel("contrastive_group_lse", x.dtype)(
            x.data_ptr(), x.shape[0], x.shape[1], 0, count, query.data_ptr(), key.data_ptr(), temperature,
            lse.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return lse


def group_lse_grad(rows: Grouped, temperature: float, lse: Tensor, grad_lse: Tensor, of_keys: bool) -> Tensor:
    """The gradient (N, D) of x, or (M, D) of the keys, in its dtype; see reference.py."""
    dtype, count = rows.keys.dtype if of_keys else rows.x.dtype, len(rows.x)
    x, query, key = _with_keys(rows)
    missing = len(x) - count
    tables = (torch.nn.functional.pad(table.to(x.dtype), (0, missing)) for table in (lse, grad_lse))
    lse, grad_lse = (table.contiguous() for table in tables)
    first, count = (count, missing) if of_keys else (0, count)
    grad = x.new_empty(count, x.shape[1])
    if grad.numel():
        zeros = torch.zeros_like(lse)
        kernel("contrastive_group_grad", x.dtype)(
            x.data_ptr(), x.shape[0], x.shape[1], first, count, query.data_ptr(), key.data_ptr(), temperature,
            lse.data_ptr(), grad_lse.data_ptr(), zeros.data_ptr(), grad.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return grad.to(dtype)
