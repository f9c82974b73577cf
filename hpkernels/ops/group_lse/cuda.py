"""The log-sum-exp over other groups and its gradient on `hpkernels._cuda`; nothing is synchronised.

Rows and columns may be the same matrix or two. Masks are made from four bytes a row where a tile needs them; a panel of
rows owns its sums and its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels import _cuda
from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.cuda import SUFFIX, TILE, launch, require_supported, shares_of_columns, whole_chunks
from hpkernels.ops.common.gpu import LOG2E, common_dtype
from hpkernels.ops.group_lse.rows import Grouped


def group_lse(rows: Grouped, temperature: float) -> Tensor:
    """(N,) fp32: log sum_{j in E_i} exp(<x_i, k_j> / temperature), 0 for an empty E_i; see reference.py."""
    pairs, device = _pairs(rows), rows.x.device
    n, m = len(pairs.rows), len(pairs.columns)
    if n == 0 or m == 0:
        return torch.zeros(n, dtype=torch.float32, device=device)
    shares = shares_of_columns(-(-n // TILE), m, device)
    parts = torch.empty(2, shares, n, dtype=torch.float32, device=device)
    scale = LOG2E / temperature
    shift = scale if common.has_fixed_shift(temperature) else -torch.inf
    pairs.launch("contrastive_group_lse", scale, shift, shares, parts.data_ptr())
    return common.merged_lse(*parts)


def group_lse_grad(rows: Grouped, temperature: float, lse: Tensor, grad_lse: Tensor, of_keys: bool) -> Tensor:
    """The gradient (N, D) of x or (M, D) of the keys, in its dtype, accumulated in fp32; see reference.py."""
    own = rows.keys if of_keys else rows.x
    pairs = _pairs(rows)
    if of_keys:
        pairs = pairs.turned()
    if pairs.rows.numel() == 0 or len(pairs.columns) == 0:
        return torch.zeros_like(own, memory_format=torch.contiguous_format)
    (grad_lse,), out_scale = common.scaled_gradients(pairs.rows.dtype, temperature, (grad_lse,))
    lse2 = (lse.float() * LOG2E).contiguous()
    shared, factor = common.shared_exponential(temperature, lse2, grad_lse)
    tables, none = (lse2.data_ptr(), factor.data_ptr()), (0, 0)  # the anchors': of the rows, of the columns, or of both
    scale = LOG2E / temperature
    n, depth = pairs.rows.shape
    panels = -(-n // _cuda.group_panel) * -(-depth * pairs.rows.element_size() // _cuda.group_piece_bytes)
    shares = shares_of_columns(panels, len(pairs.columns), own.device)
    dtype = pairs.rows.dtype if shares == 1 else torch.float32
    out = torch.empty(shares, n, depth, dtype=dtype, device=own.device)
    pairs.launch(
        "contrastive_group_grad", scale, scale if shared else 0.0, *(none if of_keys else tables),
        *(tables if of_keys or rows.keys is None else none), shares, out_scale.data_ptr(),
        *((out.data_ptr(), 0) if shares == 1 else (0, out.data_ptr())),
    )  # fmt: skip
    grad = out[0] if shares == 1 else out.sum(0)
    return grad[:, : own.shape[1]].to(own.dtype).contiguous()


class _Pairs(NamedTuple):
    """Rows and columns with their groups, as the kernels take them: one dtype, whole chunks, int32."""

    rows: Tensor
    row_groups: Tensor
    columns: Tensor
    column_groups: Tensor

    def turned(self) -> _Pairs:
        return _Pairs(self.columns, self.column_groups, self.rows, self.row_groups)

    def launch(self, function: str, *arguments: float) -> None:
        """Calls `function` for the rows' dtype, on rows, columns and groups, then the arguments."""
        rows, columns = self.rows, self.columns
        launch(getattr(_cuda, f"{function}_{SUFFIX[rows.dtype]}"), rows.device, rows.data_ptr(), len(rows),
               columns.data_ptr(), len(columns), rows.shape[1], self.row_groups.data_ptr(),
               self.column_groups.data_ptr(), *arguments)  # fmt: skip


def _pairs(rows: Grouped) -> _Pairs:
    x, groups, keys, key_groups = rows
    require_supported(x=x, keys=keys)
    groups = groups.to(torch.int32).contiguous()
    if keys is None:
        x = whole_chunks(x)
        return _Pairs(x, groups, x, groups)
    dtype = common_dtype(x, keys)
    key_groups = key_groups.to(torch.int32).contiguous()
    return _Pairs(whole_chunks(x.to(dtype)), groups, whole_chunks(keys.to(dtype)), key_groups)
