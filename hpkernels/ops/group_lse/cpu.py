"""The log-sum-exp over other groups and its gradient on the CPU: the pointer calls into `hpkernels._cpu`."""

import torch
from torch import Tensor

from hpkernels.ops.common.cpu import kernel, working


def _with_keys(
    x: Tensor, groups: Tensor, keys: Tensor | None, key_groups: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, their numbers as anchors and as columns: with keys the rows of x, then those of the keys."""
    x, groups = working(x), groups.to(torch.int32).contiguous()
    if keys is None:
        return x, groups, groups
    key_groups = key_groups.to(torch.int32)
    no_anchors, no_columns = torch.full_like(key_groups, -1), torch.full_like(groups, -1)
    return torch.cat([x, keys.to(x.dtype)]), torch.cat([groups, no_anchors]), torch.cat([no_columns, key_groups])


def group_lse(x: Tensor, groups: Tensor, keys: Tensor | None, key_groups: Tensor | None, temperature: float) -> Tensor:
    """(N,) fp32 (fp64 for fp64); see reference.py."""
    count = x.shape[0]
    rows, query, key = _with_keys(x, groups, keys, key_groups)
    lse = rows.new_zeros(count)
    if count:
        kernel("contrastive_group_lse", rows.dtype)(
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
        kernel("contrastive_group_grad", rows.dtype)(
            rows.data_ptr(), rows.shape[0], rows.shape[1], first, count, query.data_ptr(), key.data_ptr(), temperature,
            lse.data_ptr(), grad_lse.data_ptr(), zeros.data_ptr(), grad.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return grad.to(dtype)
