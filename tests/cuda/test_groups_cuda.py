"""The CUDA log-sum-exp over other groups and its gradients on the host, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.common import cuda as helpers
from hpkernels.ops.group_lse import reference
from tests.backend_checks import check_label_loss
from tests.guard import before_guard_page

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, None, 16), (65, None, 7), (150, None, 72), (40, 70, 48), (5, 1, 16), (130, 200, 24), (3, 0, 8))


def _case(n: int, m: int | None, d: int, dtype: torch.dtype) -> tuple:
    """Rows (some of them close to each other), groups with -1 among them, and keys."""

    def draw(rows: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, d) + 2 * torch.randn(1, d) * (torch.arange(rows) % 3 == 0)[:, None]
        return torch.nn.functional.normalize(x, dim=1).to(dtype), torch.randint(-1, groups, (rows,))

    return (*draw(n, 4), None, None) if m is None else (*draw(n, 4), *draw(m, 6))


def _exact(case: tuple) -> tuple:
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in case)


def _check(group_lse, case: tuple, temperature: float) -> None:
    x, _, keys, _ = case
    exact = _exact(case)
    lse, expected = group_lse.group_lse(*case, temperature), reference.group_lse(*exact, temperature)
    assert lse.dtype == torch.float32 and lse.shape == expected.shape
    assert (lse - expected).abs().amax() < 1e-6 * expected.abs().amax().clamp_min(1 / temperature)
    assert torch.equal(lse, group_lse.group_lse(*case, temperature))
    grad_lse = 1e-4 * torch.randn(len(x))
    grad_lse[::3] = 0  # rows without a gradient are common
    for of_keys in (False, True)[: 1 + (keys is not None)]:
        own = keys if of_keys else x
        grad = group_lse.group_lse_grad(*case, temperature, expected.float(), grad_lse, of_keys)
        oracle = reference.group_lse_grad(*exact, temperature, expected, grad_lse.double(), of_keys)
        assert grad.dtype == own.dtype and grad.shape == own.shape and grad.is_contiguous()
        # G is rounded to the operands' dtype; logits of 1 / temperature are rounded in fp32
        whole = x.dtype == torch.float32
        weights = max(2e-6, 1e-6 / temperature) if whole else 4e-3 if x.dtype == torch.bfloat16 else 1e-3
        assert (grad - oracle).norm() <= weights * oracle.norm() + 2 * (oracle.to(own.dtype) - oracle).norm()
        assert torch.equal(grad, group_lse.group_lse_grad(*case, temperature, expected.float(), grad_lse, of_keys))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(group_lse, shape, dtype):
    _check(group_lse, _case(*shape, dtype), 0.3)


@pytest.mark.parametrize("temperature", [0.01, 0.04, 0.07])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 70])
def test_low_temperatures(group_lse, m, dtype, temperature):
    """Below 0.05 each direction has its own exponential, below 0.025 each row its own shift."""
    _check(group_lse, _case(66, m, 16, dtype), temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_of_the_columns_are_added(group_lse, dtype, temperature, monkeypatch):
    """Five tiles of 64 columns in three shares: the last has one."""
    monkeypatch.setattr(helpers, "processor_count", lambda device: 8)
    _check(group_lse, _case(20, 300, 16, dtype), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_in_pieces(group_lse, dtype):
    """More columns of x than a panel sums."""
    _check(group_lse, _case(6, 9, 530, dtype), 0.3)


def test_operands_of_two_dtypes(group_lse):
    x, groups, keys, key_groups = _case(30, 40, 12, torch.bfloat16)
    _check(group_lse, (x.float(), groups, keys, key_groups), 0.3)


def test_who_takes_no_part(group_lse):
    x, *_ = _case(150, None, 16, torch.float32)
    for groups in (torch.full((150,), -1), torch.zeros(150, dtype=torch.int64)):  # nobody; a single group
        assert not group_lse.group_lse(x, groups, None, None, 0.1).any()
        grad = group_lse.group_lse_grad(x, groups, None, None, 0.1, torch.zeros(150), torch.ones(150), False)
        assert not grad.any()


def test_a_bad_number_shows_where_its_row_counts(group_lse):
    x, _, _, _ = _case(40, None, 16, torch.float32)
    x[7, 3] = torch.nan
    lse = group_lse.group_lse(x, torch.arange(40) // 20, None, None, 0.3)
    assert lse[20:].isnan().all() and lse[7].isnan() and lse[:20].isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_at_most_twice_those_of_torch(group_lse, dtype):
    """Plain torch on the same operands: G in fp32 and, for 16-bit x, rounded to x's dtype for the product."""
    case = _case(260, None, 64, dtype)
    x, groups, temperature, grad_lse = case[0], case[1], 0.1, torch.randn(260)
    exact = reference.group_lse(*_exact(case), temperature)
    plain = reference.group_lse(x.float(), *case[1:], temperature)
    assert (group_lse.group_lse(*case, temperature) - exact).norm() <= 2 * (plain - exact).norm()
    lse = exact.float()
    grad = group_lse.group_lse_grad(*case, temperature, lse, grad_lse, False)
    oracle = reference.group_lse_grad(*_exact(case), temperature, exact, grad_lse.double(), False)
    differ = (groups[:, None] != groups) & (groups >= 0)[:, None] & (groups >= 0)
    G = torch.where(differ, grad_lse[:, None] * torch.exp(x.float() @ x.float().T / temperature - lse[:, None]), 0.0)
    plain = ((G + G.T).to(dtype).float() @ x.float() / temperature).to(dtype)
    assert (grad - oracle).norm() <= 2 * (plain - oracle).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_operand_is_read_past_its_end(group_lse, dtype):
    case = _case(132, 197, 24, dtype)
    # int32, as the kernels take them, so that these very numbers end at the page
    guarded = tuple(before_guard_page(t if t.is_floating_point() else t.int()) for t in case)
    tables = [before_guard_page(torch.rand(132)) for _ in range(2)]
    expected = reference.group_lse(*_exact(case), 0.5)
    torch.testing.assert_close(group_lse.group_lse(*guarded, 0.5).double(), expected, atol=1e-5, rtol=0)
    for temperature in (0.04, 0.5):
        for of_keys in (False, True):
            grad = group_lse.group_lse_grad(*guarded, temperature, *tables, of_keys)
            assert grad.shape == ((197, 24) if of_keys else (132, 24)) and grad.isfinite().all()


@pytest.mark.parametrize("form", ["supcon", "per_positive"])
@pytest.mark.parametrize("bank", [False, True])
def test_loss_equals_the_reference(group_lse, form, bank):
    check_label_loss("cuda", form, bank)
