"""Contrastive statistics and their gradient on `hpkernels._cuda`; nothing is synchronised, scratch comes from torch.

fp16 and bf16 run on the matrix units with fp32 sums, fp32 in IEEE arithmetic. The op group_lse has the denominator by
groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import _cuda
from hpkernels.ops.common import exponentials as common
from hpkernels.ops.common.cuda import SUFFIX, TILE, aligned, launch, require_supported, shares_of_columns, whole_chunks
from hpkernels.ops.common.gpu import LOG2E, processor_count
from hpkernels.ops.contrastive.masks import Masks
from hpkernels.ops.contrastive.workspace import ColumnWindows, grad_by_workspace, uses_workspace

_SLOT_SHARE = (5, 32)  # capacity of the column side as a share of the pairs (row of the negatives, anchor)
_SUM_BLOCKS = 4096


def _native(masks: Masks, total: int) -> _cuda.ContrastiveMasks:
    """Aligned masks as the kernels take them; the memory is the tensors'."""
    n, stride = masks.positives.shape
    period = masks.period(total)
    return _cuda.ContrastiveMasks(*masks.addresses(), stride, period, masks.first_row, n, masks.everything)


def contrastive_stats(x: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse_i = log sum_{j in E_i} exp(l_ij) (0 for an empty E_i), pos_i = sum_j P_ij l_ij, ext_i = sum_j Q_ij l_ij.

    x (S, N, D) of unit rows; results (S, n) fp32 for the n anchors of the masks. The sums of exponentials come in
    parts, each with the base-2 shift it was taken with.
    """
    require_supported(x=x)
    n, sparse = masks.anchors, masks.denominator == "sparse"
    shape = (x.shape[0], n)
    if 0 in shape:
        return tuple(torch.zeros(shape, dtype=torch.float32, device=x.device) for _ in range(3))
    x, masks = whole_chunks(x), masks.map(aligned)
    native = _native(masks, x.shape[1])
    pairs = _cuda.ContrastivePairs
    families = [pairs.positives] if masks.negatives is None else [pairs.positives, pairs.negatives]
    tiles = -(-n // TILE) * x.shape[0]
    shares = len(families) if sparse else shares_of_columns(tiles, x.shape[1], x.device)
    parts = torch.empty(4, shares, *shape, dtype=torch.float32, device=x.device)
    scale = LOG2E / temperature
    scales = (scale, scale if common.has_fixed_shift(temperature) else -torch.inf, 1 / temperature)
    if sparse:
        for part, family in enumerate(families):
            _launch("contrastive_listed_stats", x, *x.shape, native, family, *scales, part, shares,
                    parts.data_ptr())  # fmt: skip
    else:
        _launch("contrastive_stats", x, *x.shape, native, *scales, shares, parts.data_ptr())
    return common.merged(*parts)


def contrastive_grad(
    x: Tensor, masks: Masks, temperature: float, lse: Tensor, grad_lse: Tensor, grad_pos: Tensor, grad_ext: Tensor
) -> Tensor:
    """The gradient (S, n, D) of the anchors' rows in x's dtype, accumulated in fp32; see reference.py.

    G is rounded to x's dtype for the matrix units, the row gradients scaled before as `scaled_gradients` says.
    """
    require_supported(x=x)
    if x.numel() == 0 or masks.anchors == 0:
        return x.new_empty(x.shape[0], masks.anchors, x.shape[2])
    gradients, out_scale = common.scaled_gradients(x.dtype, temperature, (grad_lse, grad_pos, grad_ext))
    lse2 = (lse.float() * LOG2E).contiguous()
    arguments = (x, masks.map(aligned), temperature, [lse2, *gradients], out_scale)
    if masks.denominator == "sparse" and masks.negatives is not None:
        return _grad_of_lists_and_columns(*arguments)
    if masks.denominator == "sparse":
        return _grad_of_lists(*arguments, _cuda.ContrastivePairs.positives)
    if uses_workspace(x.dtype, x.shape[2], x.shape[1], x.device):
        return _grad_by_workspace(*arguments)
    return _grad_of_lists(*arguments, _cuda.ContrastivePairs.all)


def _grad_by_workspace(x: Tensor, masks: Masks, temperature: float, tables: list[Tensor], out_scale: Tensor) -> Tensor:
    """The dense gradient through blocks of G + G^T, one library product each."""
    padded = whole_chunks(x)
    scale = LOG2E / temperature
    lse2, grad_lse, *others = tables
    shared, factor = common.shared_exponential(temperature, lse2, grad_lse)
    native = _native(masks, x.shape[1])

    def write_weights(s: int, block_row: int, block_rows: int, workspace: Tensor) -> None:
        _launch("contrastive_weights", padded[s], *padded.shape[1:], native, scale, scale if shared else 0.0,
                _tables(s, lse2, factor, *others), block_row, block_rows, workspace.stride(0),
                workspace.data_ptr())  # fmt: skip

    return grad_by_workspace(x, masks.first_row, masks.anchors, out_scale, TILE, TILE, write_weights)


def _grad_of_lists(
    x: Tensor, masks: Masks, temperature: float, tables: list[Tensor], out_scale: Tensor, pairs: _cuda.ContrastivePairs
) -> Tensor:
    """The gradient of panels of anchors that own their output: over all columns (dense), or over their positives'."""
    padded = whole_chunks(x)
    streams, total, d = padded.shape
    out = x.new_empty(streams, masks.anchors, d)
    native = _native(masks, total)
    for s in range(streams):
        _launch("contrastive_listed_grad", padded[s], total, d, native, pairs, LOG2E / temperature,
                _tables(s, *tables), out[s].data_ptr(), 0, False, out_scale.data_ptr(), 0, 0)  # fmt: skip
    return out[..., : x.shape[2]].contiguous()


def _grad_of_lists_and_columns(
    x: Tensor, masks: Masks, temperature: float, tables: list[Tensor], out_scale: Tensor
) -> Tensor:
    """The sparse gradient: both sides of the positives, the negatives' row side, and their column side in windows.

    Stream by stream, to bound the scratch. A column side that has more sums than its capacity is summed by panels of
    anchors over all columns instead: every launch is made, the device decides which of them work.
    """
    padded = whole_chunks(x)
    streams, total, d = padded.shape
    pairs = _cuda.ContrastivePairs
    scale = LOG2E / temperature
    n, period, native = masks.anchors, masks.period(total), _native(masks, total)
    words = -(-period // 32)
    turned = torch.empty(total, words, dtype=torch.int32, device=x.device)
    counts = torch.empty(total, dtype=torch.int32, device=x.device)
    launch(_cuda.contrastive_turn_negatives, x.device, native, total, words, turned.data_ptr(),
           counts.data_ptr())  # fmt: skip
    capacity = _column_capacity(period, n)
    windows = ColumnWindows(counts, masks.first_row, n, period, capacity, d * x.element_size())
    all_slots = windows.starts[total:].data_ptr()
    shares = max(1, 4 * processor_count(x.device) // period)  # blocks that share a row of the negatives
    workspace = x.new_empty(windows.rooms, d)
    partial = torch.empty(n, d, dtype=torch.float32, device=x.device)
    out = x.new_empty(streams, n, d)
    for s in range(streams):
        of_stream = _tables(s, *tables)
        for family, add, slots in (
            (pairs.positives, False, 0), (pairs.negatives, True, 0), (pairs.named_by_bits, True, all_slots)
        ):  # fmt: skip
            _launch("contrastive_listed_grad", padded[s], total, d, native, family, scale, of_stream,
                    0, partial.data_ptr(), add, out_scale.data_ptr(), slots, capacity)  # fmt: skip
        for w in range(windows.number):
            slots = _cuda.ColumnSlots(
                turned.data_ptr(), words, windows.starts.data_ptr(), windows.bounds[w:].data_ptr(), total, capacity
            )
            _launch("contrastive_column_side", padded[s], total, d, native, scale, of_stream, slots,
                    shares, workspace.data_ptr())  # fmt: skip
            _launch("contrastive_column_sum", workspace, masks.first_row, d, slots, min(n, _SUM_BLOCKS),
                    partial.data_ptr(), out_scale.data_ptr(), out[s].data_ptr())  # fmt: skip
    return out[..., : x.shape[2]].contiguous()


def _column_capacity(period: int, n: int) -> int:
    """Sums of the column side that find room: all of them for the rates that are called sparse."""
    return period * min(n, -(-n * _SLOT_SHARE[0] // _SLOT_SHARE[1]) + 64)


def _tables(stream: int, *tables: Tensor) -> _cuda.ContrastiveTables:
    return _cuda.ContrastiveTables(*[table[stream].data_ptr() for table in tables])


def _launch(function: str, x: Tensor, *arguments: object) -> None:
    """Calls `function` for x's dtype, x's address first."""
    launch(getattr(_cuda, f"{function}_{SUFFIX[x.dtype]}"), x.device, x.data_ptr(), *arguments)
