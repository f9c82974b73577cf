"""Parts of sums of exponentials, put together: against fp64, for any numbers of parts and kinds of shifts."""

import math

import pytest
import torch

from hpkernels.ops.common import exponentials
from hpkernels.ops.common import triton as merging


def _parts(parts, rows, shift):
    totals = torch.rand(parts, *rows) + 0.1
    shifts = torch.full((1, 1, 1), 1.8) if shift == "one" else torch.rand(parts, *rows) * 300 - 150
    totals[:, :, ::5] = 0  # rows without any exponential
    if shift == "own":
        shifts[:, :, ::5] = -torch.inf
        shifts[0], totals[0] = -torch.inf, 0  # a part without any
    return totals, shifts


@pytest.mark.parametrize("shift", ["own", "one"])
@pytest.mark.parametrize("parts, rows", [(1, (1, 1)), (2, (2, 700)), (7, (1, 512)), (3, (3, 11))])
def test_sums_of_parts(parts, rows, shift):
    totals, shifts = _parts(parts, rows, shift)
    pos, ext = torch.randn(parts, *rows), torch.randn(1, *rows)
    found = merging.merged(totals, shifts, pos, ext)
    exact = torch.logsumexp(totals.double().log() + shifts.double() * math.log(2), 0)
    exact = torch.where(exact == -torch.inf, 0, exact)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), pos.double().sum(0), rtol=0, atol=parts * 1e-6)
    assert torch.equal(found[2], ext[0])
    assert torch.equal(merging.merged_lse(totals, shifts), found[0])
    torch.testing.assert_close(exponentials.merged_lse(totals, shifts), found[0], rtol=1e-6, atol=1e-6)


def test_a_bad_part_shows_in_its_row_only():
    totals, shifts = _parts(3, (2, 40), "own")
    totals[1, 1, 3] = torch.nan
    assert merging.merged_lse(totals, shifts).isnan().nonzero().tolist() == [[1, 3]]


def test_no_rows():
    assert merging.merged_lse(torch.zeros(2, 0), torch.zeros(2, 0)).shape == (0,)
