"""torch's own op checks, forward and backward, and the whole loss against the reference: of Triton's kernels under the
interpreter, else of the CUDA kernels on the host. tests/test_ops.py has the other backends."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels.losses import panels
from tests.ops.ways import interpreting
from tests.test_ops import loss_inputs, op_calls

BACKEND = "triton" if interpreting() else "cuda"
pytestmark = [] if interpreting() else [pytest.mark.usefixtures("shim")]
CALLS = {
    name: (op, arguments) for name, op, arguments in op_calls(BACKEND, torch.device("cpu")) if BACKEND in arguments
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
    for backend in (BACKEND, "reference"):
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
