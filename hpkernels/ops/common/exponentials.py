"""What sums of exponentials on a GPU share around their kernels, of Triton and of CUDA C++: shifts, scales, merging.

Logits are kept in base 2 by both, z_ij = l_ij log2(e), so that an exponential is one exp2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpkernels.ops.common.gpu import LOG2E

_SMALLEST_FIXED_SHIFT = 0.025  # below this temperature exp(-2 / temperature) leaves fp32: the row maximum is the shift
_SHARED_EXPONENTIAL = 0.05  # from this temperature on exp2(2 c) times a row gradient is an ordinary fp32 number
_LOWEST_SHIFT = -1e30  # finite, and below every logit: a part without exponentials has the shift -inf
_HALF_GRADIENT_LARGEST = 16.0  # row gradients are scaled to this for fp16 weights


def has_fixed_shift(temperature: float) -> bool:
    """Whether the constant 1 / temperature may be the shift of every sum of exponentials of unit rows."""
    return temperature >= _SMALLEST_FIXED_SHIFT


def merged(totals: Tensor, shifts: Tensor, pos: Tensor, ext: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, pos, ext), each (S, n), of parts (parts, S, n): sums of exponentials totals * 2^shifts, and logit sums."""
    return merged_lse(totals, shifts), pos.sum(0), ext.sum(0)


def merged_lse(totals: Tensor, shifts: Tensor) -> Tensor:
    """log of the sum over parts (the first dimension) of totals * 2^shifts; 0 without any exponential."""
    base = shifts.amax(0).clamp(min=_LOWEST_SHIFT)
    total = (totals * torch.exp2(shifts - base)).sum(0)
    return torch.where(total == 0, 0.0, torch.add(torch.log(total), base, alpha=1 / LOG2E))


def scaled_gradients(
    dtype: torch.dtype, temperature: float, gradients: tuple[Tensor, ...]
) -> tuple[list[Tensor], Tensor]:
    """The row gradients in fp32 and the factor (1,) that the result still takes: 1 / temperature.

    For fp16, whose range is short, the gradients are scaled by a power of two, which the factor undoes.
    """
    gradients = [g.float().contiguous() for g in gradients]
    out_scale = torch.full((1,), 1.0 / temperature, dtype=torch.float32, device=gradients[0].device)
    if dtype == torch.float16:
        largest = torch.stack([g.abs().amax() for g in gradients]).amax()
        usable = (largest > 0) & (largest < math.inf)
        power = torch.where(usable, torch.floor(torch.log2(_HALF_GRADIENT_LARGEST / largest)), 0.0)
        gradients = [g * torch.exp2(power) for g in gradients]
        out_scale = out_scale * torch.exp2(-power)
    return gradients, out_scale


def shared_exponential(temperature: float, lse2: Tensor, grad_lse: Tensor) -> tuple[bool, Tensor]:
    """Whether one exponential exp2(z - shift) serves a pair in both directions, and the factor of a row: it is then
    grad_lse_i exp2(shift - lse_i), else grad_lse_i."""
    if temperature < _SHARED_EXPONENTIAL:
        return False, grad_lse
    return True, grad_lse * torch.exp2(LOG2E / temperature - lse2)
