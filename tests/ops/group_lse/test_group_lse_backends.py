"""What single backends do on the way to the log-sum-exp over other groups."""

from __future__ import annotations

import pytest
import torch

from hpkernels import tuning
from hpkernels.ops.group_lse import reference
from hpkernels.ops.group_lse.rows import Grouped
from tests.guard import before_guard_page

OP = "group_lse"


@pytest.mark.only("triton")
def test_wide_rows_in_pieces(kernels):
    """Output in pieces of fewer columns than D, logits computed once a piece."""
    case = Grouped(torch.nn.functional.normalize(torch.randn(40, 70), dim=1), torch.randint(-1, 4, (40,)))
    small = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_D=32, BLOCK_K=16, RESIDENT=False, num_warps=4, num_stages=1)
    lse, grad_lse = reference.group_lse(case, 0.3), torch.randn(40)
    with tuning.forced("contrastive_grad_fused", small):
        grad = kernels.group_lse_grad(case, 0.3, lse, grad_lse, False)
    torch.testing.assert_close(grad, reference.group_lse_grad(case, 0.3, lse, grad_lse, False), rtol=1e-4, atol=1e-5)


@pytest.mark.only("host-cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_operand_is_read_past_its_end(kernels, dtype):
    x, keys = (torch.nn.functional.normalize(torch.randn(rows, 24), dim=1).to(dtype) for rows in (132, 197))
    case = Grouped(x, torch.randint(-1, 4, (132,)), keys, torch.randint(-1, 6, (197,)))
    # int32, as the kernels take them, so that these very numbers end at the page
    guarded = Grouped(*(before_guard_page(t if t.is_floating_point() else t.int()) for t in case))
    tables = [before_guard_page(torch.rand(132)) for _ in range(2)]
    expected = reference.group_lse(Grouped(x.double(), case[1], keys.double(), case[3]), 0.5)
    torch.testing.assert_close(kernels.group_lse(guarded, 0.5).double(), expected, atol=1e-5, rtol=0)
    for temperature in (0.04, 0.5):
        for of_keys in (False, True):
            grad = kernels.group_lse_grad(guarded, temperature, *tables, of_keys)
            assert grad.shape == ((197, 24) if of_keys else (132, 24)) and grad.isfinite().all()
