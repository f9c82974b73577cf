"""How backend="cuda" is chosen, and a gradient through it: its kernels run on the host here."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels import dispatch

pytestmark = pytest.mark.usefixtures("shim")


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


def test_gpu_tensors_are_not_for_the_host():
    assert dispatch.why_not("cuda", torch.device("cuda")) == "it takes cpu tensors, not cuda tensors"
