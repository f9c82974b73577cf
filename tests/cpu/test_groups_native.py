"""The log-sum-exp over other groups on the CPU against the definition, per instruction set."""

import pytest
import torch

from hpkernels.ops.group_lse import cpu as native
from hpkernels.ops.group_lse import reference


def case(n, m, d, dtype):
    generator = torch.Generator().manual_seed(n + d)

    def draw(rows, groups):
        x = torch.nn.functional.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)
        return x.to(dtype), torch.randint(-1, groups, (rows,), generator=generator)

    return (*draw(n, 5), None, None) if m is None else (*draw(n, 5), *draw(m, 9))


@pytest.mark.parametrize("temperature", [0.8, 0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "n, m, d", [(1, None, 3), (193, None, 16), (450, None, 33), (33, 500, 16), (400, 1, 5), (5, 0, 4)]
)
def test_statistics_and_gradients(isa, n, m, d, dtype, temperature):
    x, groups, keys, key_groups = case(n, m, d, dtype)
    exact = (x.double(), groups, None if keys is None else keys.double(), key_groups)
    lse, expected = native.group_lse(x, groups, keys, key_groups, temperature), reference.group_lse(*exact, temperature)
    rounding = 1e-13 if dtype == torch.float64 else 2e-6
    assert lse.dtype == dtype
    assert (lse - expected).abs().max() <= rounding * expected.abs().max().clamp_min(1 / temperature)
    grad_lse = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for of_keys in (False, True)[: 1 + (m is not None)]:
        grad = native.group_lse_grad(x, groups, keys, key_groups, temperature, expected.to(dtype), grad_lse, of_keys)
        oracle = reference.group_lse_grad(*exact, temperature, expected, grad_lse.double(), of_keys)
        assert grad.shape == oracle.shape and grad.dtype == dtype
        assert (grad - oracle).norm() <= rounding / temperature * oracle.norm() + 1e-30


def test_rows_that_take_no_part():
    x, *_ = case(300, None, 8, torch.float32)
    nobody = torch.full((300,), -1)
    assert not native.group_lse(x, nobody, None, None, 0.1).any()
    assert not native.group_lse_grad(x, nobody, None, None, 0.1, torch.zeros(300), torch.ones(300), False).any()
    one = torch.zeros(300, dtype=torch.int64)  # a single group has no others
    assert not native.group_lse(x, one, None, None, 0.1).any()
