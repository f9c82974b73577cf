"""Products of matrices on the CPU: against fp64, for every layout, and the same bits for any number of threads."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.common import products
from tests.ops.ways import instruction_set

pytestmark = pytest.mark.only("cpu")


@pytest.fixture
def product(way, poisoned_memory):
    with instruction_set(way.isa):
        yield products.product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows, depth, columns", [(1, 1, 1), (0, 3, 2), (5, 0, 4), (7, 17, 33), (97, 300, 193), (200, 513, 5)]
)
def test_product(product, rows, depth, columns, dtype, same_for_all_threads):
    a, b = (torch.randn(*shape, dtype=dtype) for shape in ((rows, depth), (depth, columns)))
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()

    def in_every_layout():
        lefts, rights = (a, a.T.contiguous().T, torch.stack([a, a], 2)[..., 0]), (b, b.T.contiguous().T)
        return [product(left, right) for left in lefts for right in rights]

    same_for_all_threads(in_every_layout)
    found = in_every_layout()
    assert all(torch.equal(other, found[0]) for other in found)
    assert ((found[0] - exact).abs() <= 2 * torch.finfo(dtype).eps * depth**0.5 * size).all()
