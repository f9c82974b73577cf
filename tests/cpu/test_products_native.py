"""Products of matrices on the CPU: against fp64, for every layout, and the same bits for any number of threads."""

import pytest
import torch

from hpkernels.ops.common import products as native


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows, depth, columns", [(1, 1, 1), (0, 3, 2), (5, 0, 4), (7, 17, 33), (97, 300, 193), (200, 513, 5)]
)
def test_product(isa, rows, depth, columns, dtype):
    generator = torch.Generator().manual_seed(rows + depth)
    a, b = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((rows, depth), (depth, columns)))
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for left in (a, a.T.contiguous().T, torch.stack([a, a], 2)[..., 0]):
            for right in (b, b.T.contiguous().T):
                results.append(native.product(left, right))
    torch.set_num_threads(before)
    assert all(torch.equal(found, results[0]) for found in results)
    assert ((results[0] - exact).abs() <= 2 * torch.finfo(dtype).eps * depth**0.5 * size).all()
