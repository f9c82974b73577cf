"""The log-sum-exp over other groups and its gradients against the fp64 definition, and the loss and density on top."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels import tuning
from hpkernels.ops.group_lse import reference
from hpkernels.ops.group_lse import triton as kernels
from tests.backend_checks import check_label_loss


def _case(n, m, d, dtype, units):
    x, groups = units(n, d, dtype=dtype), torch.randint(-1, 4, (n,))
    return (x, groups, None, None) if m is None else (x, groups, units(m, d, dtype=dtype), torch.randint(-1, 6, (m,)))


@pytest.mark.parametrize("temperature", [0.8, 0.04, 0.01])
@pytest.mark.parametrize(
    "shape", [(1, None, 16), (65, None, 48), (130, None, 128), (40, 70, 48), (5, 1, 16), (70, 33, 130)]
)
def test_group_lse(shape, dtype, temperature, units, splits):
    n, m, d = shape
    case = _case(n, m, d, dtype, units)
    exact = tuple(t.double() if t is not None and t.is_floating_point() else t for t in case)
    lse, expected = kernels.group_lse(*case, temperature), reference.group_lse(*exact, temperature)
    assert lse.dtype == torch.float32
    assert (lse - expected).abs().amax() < 1e-6 * expected.abs().amax().clamp_min(1 / temperature)
    grad_lse = 1e-4 * torch.randn(n)
    grad_lse[::3] = 0
    for of_keys in (False, True)[: 1 + (m is not None)]:
        grad = kernels.group_lse_grad(*case, temperature, expected.float(), grad_lse, of_keys)
        oracle = reference.group_lse_grad(*exact, temperature, expected, grad_lse.double(), of_keys)
        assert grad.dtype == dtype and grad.shape == oracle.shape
        weights = 2e-6 if dtype == torch.float32 else 1e-3  # G is rounded to x's dtype
        if temperature < 0.05 and dtype == torch.float32:
            weights = 1e-6 / temperature  # logits of 1 / temperature, rounded
        rounding = (oracle.to(dtype) - oracle).norm()
        assert (grad - oracle).norm() <= weights * oracle.norm() + 2 * rounding
        assert torch.equal(grad, kernels.group_lse_grad(*case, temperature, expected.float(), grad_lse, of_keys))


def test_wide_rows_in_pieces(units):
    """Output in pieces of fewer columns than D, logits computed once a piece."""
    case = _case(40, None, 70, torch.float32, units)
    small = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_D=32, BLOCK_K=16, RESIDENT=False, num_warps=4, num_stages=1)
    lse, grad_lse = reference.group_lse(*case, 0.3), torch.randn(40)
    with tuning.forced("contrastive_grad_fused", small):
        grad = kernels.group_lse_grad(*case, 0.3, lse, grad_lse, False)
    torch.testing.assert_close(grad, reference.group_lse_grad(*case, 0.3, lse, grad_lse, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["supcon", "per_positive"])
@pytest.mark.parametrize("bank", [False, True])
def test_loss_equals_the_reference(form, bank):
    check_label_loss("triton", form, bank)


def test_density_equals_the_reference():
    features, memory = torch.randn(50, 20), torch.randn(120, 20)
    groups = {"query_groups": torch.arange(50) % 4, "memory_groups": torch.arange(120) % 3}
    ours, theirs = (hk.neighbor_density(features, memory, **groups, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-7)
