"""Pools of patches."""

from __future__ import annotations

import torch

from hpseg.features.pools import draw_tokens
from hpseg.runtime.distributed import ALONE, Share


def test_pools_are_full_and_even():
    def encode(batches):
        for batch in batches:
            number = torch.tensor(batch, dtype=torch.float32).view(-1, 1, 1).expand(-1, 6, 2)
            yield number + torch.arange(6).view(1, 6, 1) / 10, Share(ALONE, len(batch), torch.Generator())

    pool = draw_tokens(5, 12, 100, encode, 2, torch.Generator().manual_seed(0))
    assert pool.shape == (12, 2)
    assert pool[:, 0].floor().long().bincount(minlength=5).sort().values.tolist() == [2, 2, 2, 3, 3]
    assert draw_tokens(50, 12, 100, encode, 5, torch.Generator().manual_seed(0))[:, 0].floor().unique().numel() == 12
    assert draw_tokens(50, 12, 4, encode, 5, torch.Generator().manual_seed(0))[:, 0].floor().unique().numel() == 4
