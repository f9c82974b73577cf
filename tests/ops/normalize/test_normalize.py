"""Row normalisation and its gradient against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.shapes import EVERY_SIZE

OP = "normalize"
SIXTEEN = (torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (2, 5, 7), (3, 16), (9, 16), (3, 33), (17, 300), (65, 48), (2, 520), (129, 520)]
shapes = pytest.mark.cases("shape", SHAPES, triton=EVERY_SIZE)


def unit(x):
    """x / |x| in fp64, by way of the largest magnitude; zero rows stay zero."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(scale > 0, scale, 1)
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def output_dtype(way, dtype):
    """16-bit rows stay 16-bit on a GPU alone."""
    return dtype if dtype == torch.float64 or (way.device != "cpu" and dtype in SIXTEEN) else torch.float32


def bound(way, dtype):
    """Half a unit of 16-bit rows; GPUs have no reciprocal square root that is rounded once."""
    rounding = {torch.float64: 1e-15, torch.float32: 3e-7 if way.backend in ("reference", "cpu") else 1e-6}
    return rounding.get(dtype, torch.finfo(dtype).eps / 2)


@shapes
def test_rows(kernels, way, shape, dtype):
    """Of every size, one of them zero."""
    x = torch.randn(shape, dtype=torch.float64)
    if dtype != torch.float16:
        x *= torch.logspace(-30, 30, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    x[shape[0] // 2] = 0
    x = x.to(dtype)
    y = kernels.normalize_rows(x, "z")
    assert y.dtype == output_dtype(way, dtype) and y.shape == x.shape
    assert (y - unit(x)).abs().max() <= bound(way, y.dtype)
    assert not y[shape[0] // 2].any()


@pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=["own", "fp32"])
@shapes
def test_gradient(kernels, shape, dtype, grad_dtype):
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(grad_dtype or dtype)
    x[0] = 0
    oracle = x.double().requires_grad_()
    torch.nn.functional.normalize(oracle, dim=-1).backward(g.double())
    expected = oracle.grad
    expected[0] = 0
    grad = kernels.normalize_rows_grad(g, x)
    assert grad.dtype == dtype and not grad[0].any()
    eps = torch.finfo(dtype).eps
    largest = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, eps)
    assert (grad - expected).norm() <= (eps if dtype in SIXTEEN else 2 * eps) * expected.norm()
    assert (grad - expected).abs().max() <= largest * expected.abs().max()


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e38, 1e-38])
def test_extreme_sizes(kernels, size):
    x = (torch.randn(7, 33) * size).clamp(-3e38, 3e38)
    torch.testing.assert_close(kernels.normalize_rows(x, "x").double(), unit(x), atol=1e-6, rtol=0)


def test_extreme_sizes_have_exact_gradients(kernels):
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    grad = kernels.normalize_rows_grad(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), x)
    assert torch.allclose(grad[0] * 5e30, torch.tensor([0.64, -0.48]), rtol=1e-6)
    assert torch.allclose(grad[1] * 5e-30, torch.tensor([0.64, -0.48]), rtol=1e-6)


@pytest.mark.only("cpu")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [(0, 0), (64, 519), (3, 517)])
def test_bad_numbers_are_named(kernels, value, position):
    x = torch.ones(65, 520)
    x[position] = value
    with pytest.raises(ValueError, match="z_local: .*non-finite"):
        kernels.normalize_rows(x, "z_local")


@pytest.mark.only("reference", "cuda", "triton")
def test_bad_numbers_show_in_their_row_only(kernels):
    """Where nothing can be raised, and where the op looks at them first."""
    x = torch.zeros(4, 5, 6)
    x[1, 2, 3], x[3, 4, 0], x[0, 0, 1] = torch.nan, torch.inf, 1.0
    y = kernels.normalize_rows(x, "x")
    bad = y.isnan().all(2)
    assert bad.nonzero().tolist() == [[1, 2], [3, 4]] and y[~bad].isfinite().all() and y[0, 0, 1] == 1
    assert y[~bad].count_nonzero() == 1


@pytest.mark.only("cpu")
def test_thread_counts_agree_bitwise(kernels, same_for_all_threads):
    x = torch.randn(500, 513)
    same_for_all_threads(lambda: (kernels.normalize_rows(x, "x"), kernels.normalize_rows_grad(x.flip(0), x)))


@pytest.mark.only("reference", "cuda", "triton")
@pytest.mark.parametrize("shape", [(1, 3), (37, 20), (130, 64), (0, 5)])
def test_streams_at_once(kernels, shape):
    """The same bits as one after the other."""
    streams = [torch.randn(shape), torch.randn(shape).T.contiguous().T]
    found = kernels.normalize_streams(*streams)
    assert found.shape == (2, *shape)
    assert all(torch.equal(y, kernels.normalize_rows(x, "z")) for x, y in zip(streams, found))
    assert torch.equal(kernels.normalize_streams(streams[1]), found[1:])
    grad = torch.randn(2, *shape)
    grads = kernels.normalize_streams_grad(grad, *streams)
    assert all(torch.equal(g, kernels.normalize_rows_grad(*pair)) for g, pair in zip(grads, zip(grad, streams)))
