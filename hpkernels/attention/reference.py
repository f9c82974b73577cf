"""neighbor_attention by its definition: all N x N weights, squared distances from differences."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbor_attention(
    queries: Tensor, keys: Tensor, values: Tensor, terms: list[tuple[Tensor, float | Tensor]], scale: float
) -> Tensor:
    """queries, keys (B, H, N, d), values (B, H, N, d_v); terms: places (B, N, P) and their sigma. One dtype."""
    exponents = scale * queries @ keys.transpose(-1, -2)
    for places, sigma in terms:
        squares = (places[:, :, None] - places[:, None]).square().sum(-1)
        exponents = exponents - (squares / (2 * sigma**2))[:, None]
    return torch.softmax(exponents, -1) @ values
