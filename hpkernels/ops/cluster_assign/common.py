"""What the Triton and the CUDA C++ backend share: fp32 directions as numbers of the matrix units."""

from __future__ import annotations

import torch
from torch import Tensor


def direction_parts(directions: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Numbers of this dtype that add up to the fp32 directions, the largest first, and the bias.

    fp32: the directions themselves. 16 bits: three for each, which hold all 24 bits. A power of two brings the largest
    direction to about 2^10, which leaves room for the parts of fp16, and scales the bias, so that the largest score
    stays where it is.
    """
    if dtype == torch.float32:
        return [directions], bias
    largest = directions.abs().amax()
    scale = torch.exp2(10 - torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))))
    directions, parts = directions * scale, []
    for _ in range(3):
        parts.append(directions.to(dtype))
        directions = directions - parts[-1].float()
    return parts, bias * scale
