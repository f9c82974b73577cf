"""The CUDA kernels of row normalisation as on a GPU, where 16-bit rows stay 16-bit."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.normalize import reference

OP = "normalize"
pytestmark = pytest.mark.only("host-cuda")


@pytest.mark.cases("shape", [(1, 1), (9, 16), (3, 33), (2, 520), (17, 300)])
def test_rows_as_on_a_gpu(kernels, monkeypatch, shape, dtype):
    monkeypatch.setattr(kernels, "output_dtype", lambda x: x.dtype)
    x = torch.randn(shape).to(dtype)
    y = kernels.normalize_rows(x, "x")
    exact = reference.normalize_rows(x.double())
    assert y.dtype == dtype and y.shape == x.shape
    assert (y - exact).abs().max() <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
