"""Row normalisation and its gradient against fp64."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.normalize import reference
from hpkernels.ops.normalize import triton as kernels


def test_normalize_rows(n, d, dtype):
    x = torch.randn(n, d).to(dtype)
    x[0] = 0
    grad_out = torch.randn(n, d)
    y = kernels.normalize_rows(x, "x")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), reference.normalize_rows(x.double()), atol=1e-6, rtol=0)
    grad = kernels.normalize_rows_grad(grad_out, x)
    exact = reference.normalize_rows_grad(grad_out.double(), x.double())
    assert grad.dtype == dtype and not grad[0].any()
    assert (grad - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e38, 1e-38])
def test_extreme_sizes(size):
    x = torch.randn(7, 33) * size
    x = x.clamp(-3e38, 3e38)
    torch.testing.assert_close(
        kernels.normalize_rows(x, "x").double(), reference.normalize_rows(x.double()), atol=1e-6, rtol=0
    )


def test_bad_numbers_poison_their_row_only():
    x = torch.zeros(4, 5, 6)
    x[1, 2, 3], x[3, 4, 0] = torch.nan, torch.inf
    y = kernels.normalize_rows(x, "x")
    bad = y.isnan().all(2)
    assert bad.sum() == 2 and bad[1, 2] and bad[3, 4] and not y[~bad].any()
