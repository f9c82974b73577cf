"""Parts of sums put together by one Triton kernel, as `exponentials.merged` does it by many torch calls."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.triton import LN2, on_device

_ROWS = 512  # of a program


@triton.jit
def _sum_of_parts(part_ptr, rows, inside, N, parts):
    total = tl.zeros(rows.shape, tl.float32)
    for _ in range(parts):
        total += tl.load(part_ptr + rows, mask=inside, other=0.0)
        part_ptr += N
    return total


@triton.jit
def _merge_parts_kernel(
    totals_ptr, shifts_ptr, pos_ptr, ext_ptr, lse_ptr, pos_out_ptr, ext_out_ptr, N, parts, pos_parts, ext_parts,
    ONE_SHIFT: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lse = log sum_p totals_p 2^shifts_p, 0 without any exponential; with HAS_SUMS the sums of pos and of ext."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    if ONE_SHIFT:
        base = tl.zeros([BLOCK], tl.float32) + tl.load(shifts_ptr)
        total = _sum_of_parts(totals_ptr, rows, inside, N, parts)
    else:
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        part_ptr = shifts_ptr
        for _ in range(parts):
            largest = tl.maximum(largest, tl.load(part_ptr + rows, mask=inside, other=0.0))
            part_ptr += N
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(parts):
            shift = tl.load(shifts_ptr + rows, mask=inside, other=0.0)
            total += tl.load(totals_ptr + rows, mask=inside, other=0.0) * tl.exp2(shift - base)
            totals_ptr += N
            shifts_ptr += N
    lse = tl.where(total == 0.0, 0.0, tl.log(tl.where(total == 0.0, 1.0, total)) + base * LN2)
    tl.store(lse_ptr + rows, lse, mask=inside)
    if HAS_SUMS:
        tl.store(pos_out_ptr + rows, _sum_of_parts(pos_ptr, rows, inside, N, pos_parts), mask=inside)
        tl.store(ext_out_ptr + rows, _sum_of_parts(ext_ptr, rows, inside, N, ext_parts), mask=inside)


def merged(totals: Tensor, shifts: Tensor, pos: Tensor, ext: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, pos, ext), each (S, n), of contiguous parts (parts, S, n): sums of exponentials totals * 2^shifts, and
    logit sums. Each may have its own number of parts; shifts may be a single number."""
    out = tuple(torch.empty_like(totals[0]) for _ in range(3))  # an op's results may not share memory
    _merge(totals, shifts, (pos, ext), *out)
    return out


def merged_lse(totals: Tensor, shifts: Tensor) -> Tensor:
    """log of the sum over parts (the first dimension) of totals * 2^shifts; 0 without any exponential."""
    lse = torch.empty_like(totals[0])
    _merge(totals, shifts, (), lse)
    return lse


def _merge(totals: Tensor, shifts: Tensor, sums: tuple[Tensor, ...], *out: Tensor) -> None:
    n = out[0].numel()
    if n:
        parts = sums or (totals, totals)  # not read where there are none
        with on_device(totals):
            _merge_parts_kernel[(triton.cdiv(n, _ROWS),)](
                totals, shifts, *parts, *(out if sums else out * 3), n, len(totals), *map(len, parts),
                ONE_SHIFT=shifts.numel() == 1, HAS_SUMS=bool(sums), BLOCK=_ROWS,
            )  # fmt: skip
