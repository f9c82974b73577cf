"""The weighted average of a loss: against fp64 by definition, with its gradient, on every way that has it."""

import pytest
import torch

from hpkernels.ops.pair_average import op
from hpkernels.ops.pair_average.rows import Rows, Weights
from tests.ops.ways import interpreting

WEIGHTINGS = ("pairs", "anchors", "separate")
BACKENDS = ["triton"] if interpreting() else ["reference", "cpu", "cuda"]


def _rows(streams, images, tokens, dtype=torch.float32):
    n = images * tokens
    tables = [torch.randn(streams, n) for _ in range(3)]
    n_pos, n_ext = torch.randint(0, 4, (2, n)).float()
    if images > 1:
        n_pos[:tokens] = n_ext[:tokens] = 0  # an image without a pair
    for table, counts in zip(tables[1:], (n_pos, n_ext)):
        table *= counts > 0
    return Rows(*[table.to(dtype).requires_grad_() for table in tables], n_pos.to(dtype), n_ext.to(dtype))


def _by_definition(rows, extra, images, all_images, weighting):
    lse, pos, ext, n_pos, n_ext = rows
    total = 0.0
    for s in range(len(lse)):
        for b in range(images):
            own = slice(b * lse.shape[1] // images, (b + 1) * lse.shape[1] // images)
            kept = (n_pos[own] > 0).double()
            p, q = n_pos[own] * lse[s, own] - pos[s, own], n_ext[own] * lse[s, own] - ext[s, own]
            if weighting == "separate":
                for part, counts, factor in ((p, n_pos[own], 1.0), (q, n_ext[own], extra)):
                    total = total + (factor * part.sum() / counts.sum() if counts.sum() > 0 else 0.0 * part.sum())
                continue
            weight = kept * (n_pos[own] + extra * n_ext[own])
            part = kept * (p + extra * q)
            if weighting == "anchors":
                part, weight = part / weight.clamp(min=1), kept
            total = total + (part.sum() / weight.sum() if weight.sum() > 0 else 0.0 * part.sum())
    return total / (len(lse) * all_images)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("extra", [0.0, 0.7, torch.tensor(0.3), torch.tensor(0.25, dtype=torch.float16)])
@pytest.mark.parametrize("streams, images, tokens", [(1, 1, 1), (2, 3, 40), (1, 2, 513), (2, 1, 600)])
def test_value_and_gradient(on, weighting, extra, streams, images, tokens):
    rows = _rows(streams, images, tokens)
    found = op.pair_average(rows, Weights(extra, images, images + 1, weighting), 11.0, on)
    grads = torch.autograd.grad(found * 3, rows[:3])
    exact_rows = Rows(*[table.detach().double().requires_grad_(i < 3) for i, table in enumerate(rows)])
    exact = _by_definition(exact_rows, float(extra), images, images + 1, weighting) * 11
    exact_grads = torch.autograd.grad(exact * 3, exact_rows[:3])
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
    counted = (rows.n_pos >= 0, rows.n_pos > 0, rows.n_ext > 0)  # pos and ext of rows without pairs are the constant 0
    for ours, theirs, here in zip(grads, exact_grads, counted, strict=True):
        torch.testing.assert_close(ours.double()[:, here], theirs[:, here], rtol=1e-6, atol=1e-9)
    assert torch.equal(found, op.pair_average(rows, Weights(extra, images, images + 1, weighting), 11.0, on))


@pytest.mark.parametrize("on", BACKENDS)
def test_a_learned_weight(on):
    rows, extra = _rows(2, 3, 8), torch.tensor(0.4, requires_grad=True)
    loss = op.pair_average(rows, Weights(extra, 3, 3, "pairs"), 1.0, on)
    exact_rows, exact_extra = Rows(*[table.detach().double() for table in rows]), extra.detach().double()
    slope = torch.func.jacrev(lambda extra: _by_definition(exact_rows, extra, 3, 3, "pairs"))(exact_extra)
    torch.testing.assert_close(torch.autograd.grad(loss, extra)[0].double(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("on", BACKENDS)
def test_bad_numbers_show_and_no_rows_are_zero(on):
    rows = _rows(1, 2, 5)
    with torch.no_grad():
        rows.lse[0, 7] = torch.nan
    assert op.pair_average(rows, Weights(0.0, 2, 2, "pairs"), 1.0, on).isnan()
    nothing = Rows(*[torch.zeros(1, 0, requires_grad=True)] * 3, torch.zeros(0), torch.zeros(0))
    loss = op.pair_average(nothing, Weights(0.0, 1, 4, "pairs"), 1.0, on)
    assert loss == 0 and torch.autograd.grad(loss, nothing.lse)[0].shape == (1, 0)


if interpreting():  # elsewhere it is no op

    def test_op_checks():
        rows = _rows(2, 3, 8)
        for extra in (None, torch.tensor(0.3)):
            torch.library.opcheck(op._pair_average, (*rows, extra, 0.5, 3, 4, "anchors", 2.0))
        tables = [table.detach() for table in rows]
        torch.library.opcheck(
            op._pair_average_grad, (torch.ones(()), *tables, None, 0.5, 3, 4, "pairs", torch.ones(2, 3))
        )
