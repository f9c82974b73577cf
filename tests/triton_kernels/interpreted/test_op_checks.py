"""torch's own op checks on the triton backend, forward and backward, and the whole loss against the reference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import hpkernels as hk
from hpkernels.losses import panels

sys.path.append(str(Path(__file__).parents[2]))

from test_ops import loss_inputs, op_calls  # the calls that the other backends are checked with

CALLS = {
    name: (op, arguments) for name, op, arguments in op_calls("triton", torch.device("cpu")) if "triton" in arguments
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str):
    torch.library.opcheck(*CALLS[name])


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_loss_equals_the_reference(rate: float, at_once: bool, monkeypatch):
    """With the bits of all pairs at once, and by panels of 20 anchors."""
    if not at_once:
        monkeypatch.setattr(panels, "PANEL_MULTIPLE", 20)
        monkeypatch.setenv("HPKERNELS_BITS_BYTES", "1")
    p = loss_inputs(torch.device("cpu"))
    losses, grads = [], []
    for backend in ("triton", "reference"):
        z = p["z"].clone().requires_grad_()
        loss = hk.hidden_positive_loss(
            z, p["features"], p["pool"], z_local=p["z_local"], head_features=p["head"], head_pool=p["pool"],
            head_weight=0.5, tokens_per_image=12, negative_rate=rate, seed=1, backend=backend,
        )  # fmt: skip
        loss.backward()
        losses.append(loss.detach())
        grads.append(z.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
