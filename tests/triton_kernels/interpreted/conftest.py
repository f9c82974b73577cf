"""Unit rows for kernels under the interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def units():
    """Random unit rows in a dtype."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype)

    return draw
