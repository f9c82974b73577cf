"""Workspaces of bounded size for the gradient: blocks of G + G^T, and the windows of columns of CUDA C++."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common.gpu import tf32_accepted

WORKSPACE_BYTES = 256 << 20  # of the windows of columns
WEIGHTS_BYTES = 216 << 20  # of a block of G + G^T


def uses_workspace(dtype: torch.dtype, d: int, n: int, device: torch.device) -> bool:
    """The tuning table's choice, where the library product has fp32 accuracy (with TF32 accepted it would be plain
    TF32)."""
    if tuning.lookup("contrastive_grad", dtype, d, n, device)["route"] != "workspace":
        return False
    return dtype != torch.float32 or not tf32_accepted()


def grad_by_workspace(
    x: Tensor,
    first_row: int,
    n: int,
    out_scale: Tensor,
    first_multiple: int,
    row_multiple: int,
    write_weights: Callable[[int, int, int, Tensor], None],
) -> Tensor:
    """out_scale (G + G^T) x in x's dtype, (S, n, D), for the n anchors from first_row on.

    write_weights(stream, block_row, block_rows, workspace) writes the rows of G + G^T from block_row on, a multiple of
    first_multiple: block_rows x N of them, in x's dtype, into workspace rows of whole 16-byte chunks. The workspace has
    at most WEIGHTS_BYTES, more only where fewer than row_multiple rows fit. One library product makes a block's
    gradient of it, so no sum is carried from block to block.
    """
    streams, total, _ = x.shape
    out = x.new_empty(streams, n, x.shape[2])
    width = -(-total // 8) * 8
    begin, end = first_row // first_multiple * first_multiple, first_row + n
    fitting = WEIGHTS_BYTES // (width * x.element_size()) // row_multiple * row_multiple
    rows = min(max(row_multiple, fitting), end - begin)
    workspace = x.new_empty(rows, width)
    for s in range(streams):
        for block_row in range(begin, end, rows):
            block_rows = min(rows, end - block_row)
            write_weights(s, block_row, block_rows, workspace)
            first = max(block_row, first_row)  # the first block may reach before the anchors
            weights = workspace[first - block_row : block_rows, :total]
            part = out[s, first - first_row : block_row + block_rows - first_row]
            torch.mul(_product(weights, x[s]), out_scale, out=part)
    return out


class ColumnWindows:
    """Windows of columns whose partial sums, one for each (column, row of the negatives), share a bounded workspace.

    The sums of column j are `counts[j]` slots from starts[j] on (starts (N + 1,) int64), in all starts[N]; columns
    that are no anchors have none. Window w is the columns bounds[w] ... bounds[w + 1] (int32), all anchors together;
    its slots are at most `rooms`, unless all slots are more than `capacity`: then no window is meant to have any.
    Made on the device, from counts alone.
    """

    def __init__(self, counts: Tensor, first_row: int, n: int, period: int, capacity: int, row_bytes: int):
        self.starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))
        # A window is the columns whose first slot lies in one quota; the last of them reaches at most `period` past it.
        quota = min(max(period, WORKSPACE_BYTES // row_bytes - period), capacity)
        self.number = -(-capacity // quota)
        marks = torch.arange(self.number + 1, device=counts.device) * quota
        self.bounds = torch.searchsorted(self.starts, marks).clamp(first_row, first_row + n).to(torch.int32)
        self.bounds[0] = first_row
        self.bounds[-1] = first_row + n
        self.rooms = quota + period


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x, summed and returned in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype == torch.float32:
            return torch.mm(weights, x)
        if x.is_cuda:
            return torch.mm(weights, x, out_dtype=torch.float32)
        return torch.mm(weights.float(), x.float())  # CPU tensors, under the interpreter or on the shim
