"""Context-aware embedding: features that know their surroundings, as FS^4 (arXiv 2202.11981) describes them.

The equations are not public; this is the form that docs/fs4.md gives the description.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import hpkernels
from hpseg.models.backbone import Tokens
from hpseg.models.heads import Head, SegmentationHead, autocast
from hpseg.runtime.distributed import Share


class ContextEmbedding(nn.Module):
    """z_i = f_i + W_o sum_j a_ij W_v [f_j; e(p_j); e(c_j)], all pairs of patches of a view, without T x T numbers:

        a_ij = softmax_j( q_i . k_j / sqrt(d) - |p_i - p_j|^2 / (2 s_p^2) - |c_i - c_j|^2 / (2 s_c^2) )

    q = W_q f, k = W_k f; p: place of a patch, in short sides of the view; c: its mean colour, RGB in [0, 1]; e: sines
    and cosines of `octaves` octaves. Both sigmas are learned, from the values given, as their logarithms. W_o starts at
    0: an untrained embedding is the features.
    """

    def __init__(self, channels: int, dim: int, octaves: int, position_sigma: float, colour_sigma: float, dtype: str):
        super().__init__()
        self.octaves, self.dtype = octaves, dtype
        self.queries = nn.Linear(channels, dim)
        self.keys = nn.Linear(channels, dim, bias=False)  # one would add the same to all exponents of a query
        self.values = nn.Linear(channels + 2 * octaves * (2 + 3), dim)
        self.out = nn.Linear(dim, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.log_position_sigma = nn.Parameter(torch.tensor(math.log(position_sigma)))
        self.log_colour_sigma = nn.Parameter(torch.tensor(math.log(colour_sigma)))

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, T, channels) fp32."""
        features, colours = tokens.features, tokens.colours
        positions = grid_positions(tokens.grid, features)
        places = waves(positions, self.octaves).expand(len(features), -1, -1)
        with autocast(features, self.dtype):
            queries, keys = self.queries(features), self.keys(features)
            values = self.values(torch.cat([features, places, waves(colours, self.octaves)], -1))
        # Outside: it computes in fp32 whatever it is called in, and torch.export loads no region within a region.
        mixed = hpkernels.neighbor_attention(
            queries,
            keys,
            values,
            positions,
            colours,
            position_sigma=self.log_position_sigma.exp(),
            appearance_sigma=self.log_colour_sigma.exp(),
        )
        with autocast(features, self.dtype):
            return features + self.out(mixed).float()


class ContextHead(Head):
    """A SegmentationHead on a ContextEmbedding of the features, or on the features themselves with context None."""

    def __init__(self, head: SegmentationHead, context: ContextEmbedding | None):
        super().__init__()
        self.head, self.context = head, context

    def forward(self, tokens: Tokens, dropout: float = 0.0, share: Share | None = None) -> Tensor:
        features = tokens.features if self.context is None else self.context(tokens)
        return self.head(features, dropout, share)

    def codes_of(self, tokens: Tokens) -> Tensor:
        return self(tokens)


def grid_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(y, x) of the centres of patches from the middle of the view, in its short sides: (T, 2)."""
    rows, columns = grid
    y, x = (torch.arange(n, dtype=torch.float32, device=like.device) - (n - 1) / 2 for n in (rows, columns))
    places = torch.stack([y[:, None].expand(rows, columns), x.expand(rows, columns)], -1)
    return places.flatten(0, 1) / torch.sym_min(rows, columns)


def waves(x: Tensor, octaves: int) -> Tensor:
    """sin and cos of pi 2^o x for o = 0 .. octaves - 1: (..., n) -> (..., 2 octaves n)."""
    angles = (x[..., None] * (math.pi * 2.0 ** torch.arange(octaves, device=x.device))).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)
