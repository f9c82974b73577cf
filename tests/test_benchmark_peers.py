"""Libraries that need a GPU or are not installed are called as they want: stand-ins of their signatures pass the gates.

Signatures: flash-kmeans 0.3.1, fastkmeans 0.5.0, siglip-kernel 0.1.2; cut-cross-entropy and inf-cl as already called.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import checks, peers, plain
from benchmarks.cases import KINDS
from benchmarks.peers import ANY, PACKAGES


def batch_kmeans_Euclid(x, n_clusters, max_iters=100, tol=0.0, init_centroids=None, verbose=False, **more):
    assert x.ndim == 3 and init_centroids.shape == (len(x), n_clusters, x.shape[2]) and tol < 0
    centroids = torch.stack([plain.kmeans(*pair, max_iters) for pair in zip(x, init_centroids, strict=True)])
    return torch.zeros(x.shape[:2], dtype=torch.int64), centroids, max_iters


class FastKMeans:
    """Starts from the first k of a random order, as fastkmeans does."""

    def __init__(self, d: int, k: int, niter: int = 25, tol: float = 1e-8, gpu: bool = True, dtype=None):
        self.k, self.niter = k, niter

    def train(self, data: np.ndarray) -> None:
        assert data.dtype == np.float32
        rows = torch.from_numpy(data)
        self.centroids = plain.kmeans(rows, rows[torch.randperm(len(rows))[: self.k]], self.niter).numpy()


def fused_siglip_loss(img: Tensor, txt: Tensor, log_temperature: Tensor, bias: Tensor, **more) -> Tensor:
    logits = img @ txt.T * log_temperature.exp() + bias
    return F.softplus(-logits * (2 * torch.eye(len(img)) - 1)).sum() / len(img)


def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, reduction: str = "mean", filter_eps="auto") -> Tensor:
    assert filter_eps is None  # else small gradients are dropped
    return F.cross_entropy(e @ c.T, targets, reduction=reduction)


def cal_flash_loss(q: Tensor, k: Tensor, scale: float = 1.0, head_dim: int = 256) -> Tensor:
    assert q.shape[1] % head_dim == 0
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


STAND_INS = {
    "flash-kmeans": batch_kmeans_Euclid,
    "fastkmeans": FastKMeans,
    "siglip-kernel": fused_siglip_loss,
    "cut-cross-entropy": linear_cross_entropy,
    "inf-cl": cal_flash_loss,
}
WIRED = [(kind, peer) for kind in KINDS for peer in KINDS[kind].contenders if peer in STAND_INS]


def _install(monkeypatch: pytest.MonkeyPatch, peer: str, stand_in: object) -> None:
    """On the CPU in fp32, wherever the library itself runs."""
    package = PACKAGES[peer]
    module = ModuleType(package.module)
    setattr(module, stand_in.__name__, stand_in)
    monkeypatch.setitem(sys.modules, package.module, module)
    monkeypatch.setitem(PACKAGES, peer, replace(package, devices=("cpu",), dtypes=ANY))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: module)


@pytest.mark.parametrize(("kind", "peer"), WIRED)
def test_a_stand_in_passes_the_gate(kind: str, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, peer, STAND_INS[peer])
    assert checks.gate(kind, peer, "cpu", torch.float32) == {"state": "ok"}


@pytest.mark.parametrize("peer", ["siglip-kernel", "inf-cl", "cut-cross-entropy"])
def test_a_wrong_one_does_not(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args, **options):
        return 1.01 * STAND_INS[peer](*args, **options)

    wrong.__name__ = STAND_INS[peer].__name__
    _install(monkeypatch, peer, wrong)
    assert checks.gate("infonce", peer, "cpu", torch.float32)["state"] == "red"


@pytest.mark.parametrize("peer", STAND_INS)
def test_where_it_is_not_the_reason_is_said(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert f"{PACKAGES[peer].distribution} is not installed" in peers.why_not(peer, "cuda", torch.bfloat16)
    if PACKAGES[peer].devices == ("cuda",):
        assert "GPU" in peers.why_not(peer, "cpu", torch.float32)


def test_an_older_torch_has_no_linear_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert "has no linear_cross_entropy" in peers.why_not("torch-linear-cross-entropy", "cpu", torch.float32)
