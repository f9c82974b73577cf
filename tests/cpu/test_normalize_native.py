"""Row normalisation on the CPU against fp64."""

import pytest
import torch

from hpkernels.ops.normalize import cpu as native


def example(rows, width, dtype):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    x *= torch.logspace(-30, 30, rows, dtype=torch.float64)[:, None]
    x[rows // 2] = 0
    return x.to(dtype)


def direct(x):
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(scale > 0, scale, 1)
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-7), (torch.float64, 1e-15), (torch.bfloat16, 3e-7)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (65, 48), (129, 520)])
def test_rows(isa, shape, dtype, bound):
    x = example(*shape, dtype)
    y = native.normalize_rows(x, "z")
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (y - direct(x)).abs().max() <= bound
    assert not y[shape[0] // 2].any()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(3, 16), (65, 48), (129, 520), (2, 5, 7)])
def test_gradient(isa, shape, dtype, bound):
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    x[0] = 0
    oracle = x.double().requires_grad_()
    torch.nn.functional.normalize(oracle, dim=-1).backward(g.double())
    expected = oracle.grad
    expected[0] = 0
    grad = native.normalize_rows_grad(g, x)
    assert grad.dtype == dtype
    assert (grad - expected).abs().max() <= bound * expected.abs().max()


def test_extreme_scales_have_exact_gradients():
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    grad = native.normalize_rows_grad(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), x)
    assert torch.allclose(grad[0] * 5e30, torch.tensor([0.64, -0.48]), rtol=1e-6)
    assert torch.allclose(grad[1] * 5e-30, torch.tensor([0.64, -0.48]), rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [(0, 0), (64, 519), (3, 517)])
def test_non_finite_input_is_named(value, position):
    x = torch.ones(65, 520)
    x[position] = value
    with pytest.raises(ValueError, match="z_local: .*non-finite"):
        native.normalize_rows(x, "z_local")


def test_thread_counts_agree_bitwise():
    x = torch.randn(500, 513)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((native.normalize_rows(x, "x"), native.normalize_rows_grad(x.flip(0), x)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
