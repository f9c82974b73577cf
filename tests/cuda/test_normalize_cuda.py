"""The CUDA kernels of row normalisation on the host, against fp64."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.normalize import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1), (9, 16), (3, 33), (2, 520), (17, 300)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_as_on_a_gpu(normalize, monkeypatch, shape, dtype):
    """16-bit rows stay 16-bit there."""
    monkeypatch.setattr(normalize, "output_dtype", lambda x: x.dtype)
    x = torch.randn(shape).to(dtype)
    y = normalize.normalize_rows(x, "x")
    exact = reference.normalize_rows(x.double())
    assert y.dtype == dtype and y.shape == x.shape
    assert (y - exact).abs().max() <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(normalize, shape, dtype, grad_dtype):
    x = torch.randn(shape).to(dtype)
    x[0] = 0
    grad_out = torch.randn(shape).to(grad_dtype or dtype)
    grad = normalize.normalize_rows_grad(grad_out, x)
    exact = reference.normalize_rows_grad(grad_out.double(), x.double())
    assert grad.dtype == dtype and not grad[0].any()
    assert (grad - exact).norm() <= torch.finfo(dtype).eps * exact.norm() * (2 if dtype == torch.float32 else 1)


def test_rows_of_the_op_are_fp32_on_the_cpu(normalize):
    x = torch.randn(2, 3, 40).half()
    y = normalize.normalize_rows(x, "x")
    assert y.dtype == torch.float32 and y.shape == x.shape
    torch.testing.assert_close(y.double(), reference.normalize_rows(x.double()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e38, 1e-38])
def test_extreme_sizes(normalize, size):
    x = (torch.randn(7, 33) * size).clamp(-3e38, 3e38)
    exact = reference.normalize_rows(x.double())
    torch.testing.assert_close(normalize.normalize_rows(x, "x").double(), exact, atol=1e-6, rtol=0)


def test_bad_numbers_poison_their_row_only(normalize):
    x = torch.zeros(4, 5, 6)
    x[1, 2, 3], x[3, 4, 0], x[0, 0, 1] = torch.nan, torch.inf, 1.0
    y = normalize.normalize_rows(x, "x")
    bad = y.isnan().all(2)
    assert bad.nonzero().tolist() == [[1, 2], [3, 4]] and y[~bad].isfinite().all() and y[0, 0, 1] == 1
