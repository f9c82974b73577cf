"""Rows, width and dtype for Triton's interpreter: each value by default, the other combinations with -m slow."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.ways import NAMES

ROWS, WIDTHS = (1, 2, 63, 65, 129, 196, 784), (16, 48, 384, 512, 520)
SOME = [  # each value at least once, each width in both dtypes
    (1, 16, torch.float32), (2, 48, torch.float16), (63, 384, torch.float16), (65, 512, torch.float16),
    (65, 48, torch.float32), (129, 520, torch.float32), (196, 16, torch.float16), (784, 16, torch.float32),
    (63, 384, torch.float32), (2, 520, torch.float16), (63, 512, torch.float32),
]  # fmt: skip
EVERY = [
    pytest.param(n, d, t, marks=() if (n, d, t) in SOME else pytest.mark.slow, id=f"{n}-{d}-{NAMES[t]}")
    for n, d, t in itertools.product(ROWS, WIDTHS, (torch.float32, torch.float16))
]
EVERY_SIZE = [  # in each dtype
    pytest.param((n, d), marks=() if any(some[:2] == (n, d) for some in SOME) else pytest.mark.slow)
    for n, d in itertools.product(ROWS, WIDTHS)
]
