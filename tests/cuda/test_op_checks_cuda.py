"""torch's own op checks on backend="cuda", whose kernels run on the host here, and the losses through it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import hpkernels as hk
from hpkernels import dispatch

sys.path.append(str(Path(__file__).parents[1]))

from test_ops import loss_inputs, op_calls  # the calls that the other backends are checked with

pytestmark = pytest.mark.usefixtures("shim")
CALLS = {name: (op, arguments) for name, op, arguments in op_calls("cuda", torch.device("cpu")) if "cuda" in arguments}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str):
    torch.library.opcheck(*CALLS[name])


def test_choice_is_traced_as_a_constant(monkeypatch):
    """HPKERNELS_BACKEND=cuda through torch.compile(fullgraph=True): asking the extension is no graph break."""
    monkeypatch.setenv("HPKERNELS_BACKEND", "cuda")
    torch._dynamo.reset()
    x = torch.randn(20, 16)

    def search(x):
        return hk.max_similarity(x, x), hk.pairs_above(x, x[:, 0]).sum(1)

    best, counts = torch.compile(search, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(best, hk.max_similarity(x, x, backend="reference"))
    assert torch.equal(counts, hk.pairs_above(x, x[:, 0], backend="reference").sum(1))


def test_local_mix_and_its_gradient():
    code, attention = torch.randn(2, 20, 6), torch.randn(2, 3, 20, 20)
    mixed, grads = [], []
    for backend in ("cuda", "reference"):
        leaf = code.clone().requires_grad_()
        mixed.append(hk.local_mix(leaf, attention, (4, 5), backend=backend))
        mixed[-1].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(mixed[0], mixed[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_loss_equals_the_reference(rate: float):
    p = loss_inputs(torch.device("cpu"))
    losses, grads = [], []
    for backend in ("cuda", "reference"):
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


def test_gpu_tensors_are_not_for_the_host():
    assert dispatch.why_not("cuda", torch.device("cuda")) == "it takes cpu tensors, not cuda tensors"
