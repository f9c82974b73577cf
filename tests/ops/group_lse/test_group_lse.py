"""The log-sum-exp over other groups and its gradients against the definition in fp64, and the loss on top of it."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels.ops.group_lse import reference
from hpkernels.ops.group_lse.rows import Grouped
from tests.ops.ways import moved

OP = "group_lse"
SHAPES = [(1, None, 16), (65, None, 7), (5, 1, 16), (40, 70, 48), (3, 0, 8)]
OF_CPU = [(1, None, 3), (193, None, 16), (450, None, 33), (33, 500, 16), (400, 1, 5), (5, 0, 4), (6, 9, 530)]
OF_CUDA = [(150, None, 72), (130, 200, 24), (6, 9, 530)]  # the last: more columns of x than a panel sums
OF_TRITON = [(65, None, 48), (130, None, 128), (70, 33, 130)]
# Below 0.05 each direction has its own exponential, below 0.025 each row its own shift.
LOW = [(66, m, 16, temperature, 1) for m in (None, 70) for temperature in (0.01, 0.04, 0.07)]
SHARED = [(20, 300, 16, 0.01, 8), (20, 300, 16, 0.3, 8)]  # five tiles of 64 columns in three shares: the last has one


def at(temperatures, shapes, processors=1):
    return [(*shape, temperature, processors) for shape in shapes for temperature in temperatures]


def draw(rows, d, groups, dtype):
    """Rows, some of them close to each other, and groups with -1 among them."""
    x = torch.randn(rows, d, dtype=torch.float64)
    x += 2 * torch.randn(1, d) * (torch.arange(rows) % 3 == 0)[:, None]
    return torch.nn.functional.normalize(x, dim=1).to(dtype), torch.randint(-1, groups, (rows,))


def draw_case(n, m, d, dtype):
    return Grouped(*draw(n, d, 4, dtype), *(() if m is None else draw(m, d, 6, dtype)))


def exactly(case):
    return Grouped(*(t.double() if t is not None and t.is_floating_point() else t for t in case))


def check(kernels, case, temperature):
    x, _, keys, _ = case
    exact, working = exactly(case), torch.float64 if x.dtype == torch.float64 else torch.float32
    rounding = 1e-13 if working == torch.float64 else 1e-6
    lse, expected = kernels.group_lse(case, temperature), reference.group_lse(exact, temperature)
    assert lse.dtype == working and lse.shape == expected.shape
    if len(x):
        assert (lse - expected).abs().amax() <= rounding * expected.abs().amax().clamp_min(1 / temperature)
    assert torch.equal(lse, kernels.group_lse(case, temperature))
    grad_lse = 1e-4 * torch.randn(len(x), dtype=working)
    grad_lse[::3] = 0  # rows without a gradient are common
    for of_keys in (False, True)[: 1 + (keys is not None)]:
        own = keys if of_keys else x
        grad = kernels.group_lse_grad(case, temperature, expected.to(working), grad_lse, of_keys)
        oracle = reference.group_lse_grad(exact, temperature, expected, grad_lse.double(), of_keys)
        assert grad.dtype == own.dtype and grad.shape == own.shape and grad.is_contiguous()
        # G is rounded to the operands' dtype; logits of 1 / temperature are rounded in the working one
        weights = {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(x.dtype, max(2 * rounding, rounding / temperature))
        assert (grad - oracle).norm() <= weights * oracle.norm() + 2 * (oracle.to(own.dtype) - oracle).norm()
        assert torch.equal(grad, kernels.group_lse_grad(case, temperature, expected.to(working), grad_lse, of_keys))


@pytest.mark.cases(
    "n, m, d, temperature, processors_",
    at([0.3], SHAPES),
    reference=at([0.8, 0.05, 0.01], OF_CPU),
    cpu=[*at([0.8, 0.05, 0.01], SHAPES + OF_CPU), *LOW],
    cuda=[*at([0.3], OF_CUDA), *LOW, *SHARED],
    triton=[*at([0.8, 0.04, 0.01], SHAPES + OF_TRITON, processors=8), *LOW, *SHARED],
)
def test_statistics_and_gradients(kernels, n, m, d, temperature, processors_, dtype, processors):
    processors(processors_)
    check(kernels, draw_case(n, m, d, dtype), temperature)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
def test_operands_of_two_dtypes(kernels, dtypes):
    x, groups, keys, key_groups = draw_case(30, 40, 12, dtypes[1])
    check(kernels, Grouped(x.to(dtypes[0]), groups, keys, key_groups), 0.3)


@pytest.mark.cases("n", [150], cpu=[300])
def test_rows_that_take_no_part(kernels, n):
    """Nobody; a single group, which has no others."""
    x, *_ = draw_case(n, None, 16, torch.float32)
    for groups in (torch.full((n,), -1), torch.zeros(n, dtype=torch.int64)):
        assert not kernels.group_lse(Grouped(x, groups), 0.1).any()
        assert not kernels.group_lse_grad(Grouped(x, groups), 0.1, torch.zeros(n), torch.ones(n), False).any()


@pytest.mark.only("reference", "cuda", "triton")
def test_a_bad_number_shows_where_its_row_counts(kernels):
    x, *_ = draw_case(40, None, 16, torch.float32)
    x[7, 3] = torch.nan
    lse = kernels.group_lse(Grouped(x, torch.arange(40) // 20), 0.3)
    assert lse[20:].isnan().all() and lse[7].isnan() and lse[:20].isnan().sum() == 1


@pytest.mark.cases("dtype", [torch.float32], cuda=[torch.bfloat16, torch.float16], triton=[torch.float16])
def test_errors_are_at_most_twice_those_of_torch(kernels, dtype):
    """Plain torch on the same operands: G in fp32 and, for 16-bit x, rounded to x's dtype for the product."""
    case = draw_case(260, None, 64, dtype)
    x, groups, temperature, grad_lse = case[0], case[1], 0.1, torch.randn(260)
    exact = reference.group_lse(exactly(case), temperature)
    plain = reference.group_lse(Grouped(x.float(), *case[1:]), temperature)
    assert (kernels.group_lse(case, temperature) - exact).norm() <= 2 * (plain - exact).norm()
    lse = exact.float()
    grad = kernels.group_lse_grad(case, temperature, lse, grad_lse, False)
    oracle = reference.group_lse_grad(exactly(case), temperature, exact, grad_lse.double(), False)
    differ = (groups[:, None] != groups) & (groups >= 0)[:, None] & (groups >= 0)
    G = torch.where(differ, grad_lse[:, None] * torch.exp(x.float() @ x.float().T / temperature - lse[:, None]), 0.0)
    plain = ((G + G.T).to(dtype).float() @ x.float() / temperature).to(dtype)
    assert (grad - oracle).norm() <= 2 * (plain - oracle).norm()


@pytest.mark.only("cpu", "cuda", "triton")
@pytest.mark.parametrize("form", ["supcon", "per_positive"])
@pytest.mark.parametrize("bank", [False, True])
def test_loss_equals_the_reference(kernels, way, form, bank):
    """And so do its gradients, with image ids."""
    z, labels, images = torch.randn(70, 12), torch.randint(-1, 4, (70,)), torch.randint(3, (70,))
    keys, key_labels, key_images = torch.randn(40, 12), torch.randint(-1, 4, (40,)), torch.randint(3, (40,))
    results = []
    for backend, device in ((way.backend, way.device), ("reference", "cpu")):
        own, others = (t.detach().requires_grad_() for t in moved((z.clone(), keys.clone()), device))
        options = {"image_ids": moved((images, key_images), device) if bank else images.to(device)}
        if bank:
            options |= {"keys": others, "key_labels": key_labels.to(device)}
        loss = hk.supervised_contrastive_loss(
            own, labels.to(device), temperature=0.1, form=form, backend=backend, **options
        )
        loss.backward()
        results.append(moved((loss.detach(), own.grad, *((others.grad,) if bank else ())), "cpu"))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
