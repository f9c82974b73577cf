"""Shapes, and what "as good as torch" means."""

from __future__ import annotations

import itertools

import pytest
import torch

ROWS, WIDTHS = (1, 2, 63, 65, 129, 196, 784), (16, 48, 384, 512, 520)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16"}
SOME = [  # each value at least once, each width in both dtypes
    (1, 16, torch.float32), (2, 48, torch.float16), (63, 384, torch.float16), (65, 512, torch.float16),
    (65, 48, torch.float32), (129, 520, torch.float32), (196, 16, torch.float16), (784, 16, torch.float32),
    (63, 384, torch.float32), (2, 520, torch.float16), (63, 512, torch.float32),
]  # fmt: skip
EVERY = [
    pytest.param(n, d, t, marks=() if (n, d, t) in SOME else pytest.mark.slow, id=f"{n}x{d}-{DTYPES[t]}")
    for n, d, t in itertools.product(ROWS, WIDTHS, DTYPES)
]


def pytest_generate_tests(metafunc):
    """`n`, `d`, `dtype`: rows, width and dtype, each value by default, the other combinations with -m slow."""
    if {"n", "d", "dtype"} <= set(metafunc.fixturenames):
        metafunc.parametrize("n, d, dtype", EVERY)
    elif "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=DTYPES.values())


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def units():
    """Random unit rows in a dtype."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype)

    return draw


@pytest.fixture
def splits(monkeypatch):
    """Pretend to have many processors, so that the loops over tiles are split."""
    from hpkernels.ops.common import gpu

    monkeypatch.setattr(gpu, "processor_count", lambda device: 8)
