"""mask @ x by what the triton backend runs, forward and backward."""

import pytest
import torch

import hpkernels as hk


@pytest.mark.parametrize("rate", [0.01, 0.4])
def test_sums_of_rows(rate, monkeypatch):
    monkeypatch.setenv("HPKERNELS_BACKEND", "triton")
    mask, x = hk.PairMask.random(rate, (40, 150), 1), torch.randn(150, 5, requires_grad=True)
    dense, grad = mask.to_dense().float(), torch.randn(40, 5)
    out = mask @ x
    out.backward(grad)
    torch.testing.assert_close(out, dense @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, dense.T @ grad, rtol=1e-5, atol=1e-5)
