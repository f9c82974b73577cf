"""Checks that hold for more than one backend's kernels: the CUDA ones on the host and Triton's in its interpreter."""

from __future__ import annotations

from types import ModuleType

import torch

import hpkernels as hk
from hpkernels.clustering.rows import scores
from hpkernels.ops.cluster_assign import reference


def check_assignment(backend: ModuleType, n: int, d: int, k: int, dtype: torch.dtype) -> None:
    """backend.cluster_assign of n random rows of width d to k centroids: nearest by fp64, sums and counts of its own
    labels, the same bits again."""
    x, centroids = torch.randn(n, d).to(dtype), torch.randn(k, d)
    directions, bias = scores(centroids, False)
    labels, distances, sums, counts = backend.cluster_assign(x, centroids, directions, bias)
    exact = reference.cluster_assign(x.double(), centroids.double(), *(t.double() for t in (directions, bias)))
    own = (x.double() - centroids.double()[labels]).square().sum(1)
    assert (own <= exact[1] * (1 + 1e-6)).all()
    assert ((distances - own).abs() <= 1e-6 * (1 + own)).all()
    one_hot = torch.nn.functional.one_hot(labels, k).double()
    torch.testing.assert_close(sums.double(), one_hot.T @ x.double(), rtol=1e-6, atol=1e-5)
    assert torch.equal(counts, one_hot.sum(0).long()) and labels.dtype == torch.int64
    again = backend.cluster_assign(x, centroids, directions, bias)
    assert all(torch.equal(a, b) for a, b in zip(again, (labels, distances, sums, counts), strict=True))


def check_label_loss(backend: str, form: str, bank: bool) -> None:
    """supervised_contrastive_loss and its gradients on a backend, with image ids, are those of the reference."""
    z, labels, images = torch.randn(70, 12), torch.randint(-1, 4, (70,)), torch.randint(3, (70,))
    keys, key_labels, key_images = torch.randn(40, 12), torch.randint(-1, 4, (40,)), torch.randint(3, (40,))
    results = []
    for name in (backend, "reference"):
        own, others = z.clone().requires_grad_(), keys.clone().requires_grad_()
        options = {"keys": others, "key_labels": key_labels, "image_ids": (images, key_images)}
        options = options if bank else {"image_ids": images}
        loss = hk.supervised_contrastive_loss(own, labels, temperature=0.1, form=form, backend=name, **options)
        loss.backward()
        results.append((loss.detach(), own.grad) + ((others.grad,) if bank else ()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
