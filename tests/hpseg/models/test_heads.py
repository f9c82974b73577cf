"""Heads: momentum, dropout, autocast."""

from __future__ import annotations

import pytest
import torch

from hpseg.methods.hp import HiddenPositives
from hpseg.models.heads import Projection, SegmentationHead, channel_dropout
from hpseg.run.config import make_config
from hpseg.runtime.distributed import ALONE, Share


def test_momentum_head_and_channel_dropout():
    torch.manual_seed(0)
    a, b = SegmentationHead(4, 3), SegmentationHead(4, 3)
    expected = 0.9 * a.linear.weight + 0.1 * b.linear.weight
    a.follow(b, 0.9)
    torch.testing.assert_close(a.linear.weight, expected)
    x = torch.ones(50, 3, 40)
    dropped = channel_dropout(x, 0.25, Share(ALONE, len(x), torch.Generator().manual_seed(0)))
    assert torch.equal(dropped, dropped[:, :1].expand_as(x))  # one mask per image
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75]) and dropped.mean() == pytest.approx(1, abs=0.05)
    f = torch.randn(2, 5, 4)
    torch.testing.assert_close(a(f), a.linear(f) + a.out(torch.relu(a.hidden(f))))


def test_bf16_is_autocast_of_heads_and_projection():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    for part in (SegmentationHead(32, 16, "bf16"), Projection(32, "bf16")):
        low = part(x)
        part.dtype = "fp32"
        high = part(x)
        assert low.dtype == torch.float32 and not torch.equal(low, high)
        torch.testing.assert_close(low, high, rtol=0.02, atol=0.02)
    method = HiddenPositives(32, make_config(classes=3, dim=16, dtype="bf16"))
    assert [part.dtype for part in (method.head, method.momentum_head, method.projection)] == ["bf16"] * 3
