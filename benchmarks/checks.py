"""Correctness gates: each case's contenders agree on a small input, or the case yields no figures.

Run by the benchmark before it measures (in a process of its own) and by tests/test_benchmarks.py.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import hpkernels
from benchmarks import published
from benchmarks.cases import step
from benchmarks.features import make_attention, make_batch

TOLERANCE = 1e-5


class GateFailed(AssertionError):
    """Two contenders disagree."""


def check_step(device: str, rate: float) -> None:
    """The loss and both gradients against the published algorithm, on one explicit random mask."""
    batch = make_batch(3, (9, 11), channels=96, code=80, pool=300, device=device)
    generator = torch.Generator().manual_seed(7)
    mask = (torch.rand(99, 297, generator=generator) < max(rate, 0.05)).to(device)
    ours = step(batch, hpkernels.hidden_positive_loss, rate, negative_mask=mask)
    gradients = batch.z.grad, batch.z_local.grad
    theirs = step(batch, published.hidden_positive_loss, rate, negative_mask=mask)
    _close("loss", ours, theirs)
    _close("gradient of z", gradients[0], _tangential(batch.z.grad, batch.z))
    _close("gradient of z_local", gradients[1], _tangential(batch.z_local.grad, batch.z_local))
    if rate == 1:
        full = step(batch, hpkernels.hidden_positive_loss, 1.0)
        everything = torch.ones_like(mask)
        _close("loss at rho 1", full, step(batch, published.hidden_positive_loss, 1.0, negative_mask=everything))


def check_search(device: str) -> None:
    """Every decision of hidden_positives that is not a matter of rounding."""
    batch = make_batch(3, (9, 11), channels=96, code=80, pool=300, device=device)
    found = hpkernels.hidden_positives(batch.features, batch.pool).to_dense()
    x, pool = batch.features.double(), batch.pool.double()
    best = (x @ pool.T).amax(1)
    margin = x @ x.T - torch.minimum(best[:, None], best)
    clear = margin.abs() > 1e-5
    expected = (margin > 0).fill_diagonal_(False)
    if not torch.equal(found & clear, expected & clear):
        raise GateFailed("hidden_positives: decisions differ from the similarity matrix")


def check_local_mix(device: str) -> None:
    grid = (9, 11)
    attention = make_attention(2, grid, heads=3, device=device)
    generator = torch.Generator().manual_seed(3)
    code = torch.randn(2, 99, 40, generator=generator).to(device).requires_grad_()
    grad = torch.randn(2, 99, 40, generator=generator).to(device)
    results = []
    for function in (hpkernels.local_mix, published.local_mix):
        code.grad = None
        mixed = function(code, attention, grid)
        mixed.backward(grad)
        results.append((mixed.detach(), code.grad))
    _close("mixed code", results[0][0], results[1][0])
    _close("gradient of code", results[0][1], results[1][1])


def check_topk(device: str) -> None:
    queries = make_batch(2, (9, 11), channels=96, code=8, pool=1, device=device).features
    keys = make_batch(3, (9, 11), channels=96, code=8, pool=1, seed=1, device=device).features
    values, indices = hpkernels.topk_similarity(queries, keys, 16)
    similarity = queries.double() @ keys.double().T
    _close("top-k values", values.double(), torch.topk(similarity, 16).values)
    _close("top-k indices", similarity.gather(1, indices), values.double())


GATES = {
    "step_rho_0.02": lambda device: check_step(device, 0.02),
    "step_rho_1": lambda device: check_step(device, 1.0),
    "search": check_search,
    "local_mix": check_local_mix,
    "topk": check_topk,
}


def _tangential(grad: Tensor, unit: Tensor) -> Tensor:
    """Both losses normalise inside; removing the radial part again takes away what rounding left of it."""
    unit = unit.detach()
    return grad - (grad * unit).sum(1, keepdim=True) * unit


def _close(what: str, ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).double().norm() / theirs.double().norm())
    if not error <= TOLERANCE:
        raise GateFailed(f"{what}: relative difference {error:.2e}, allowed {TOLERANCE:.0e}")


def main() -> None:
    case, device = sys.argv[1:]
    try:
        GATES[case](device)
    except GateFailed as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    main()
