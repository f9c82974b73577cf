"""The interpreter's products of bf16 are garbage: every kernel with one says so instead."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk

X = torch.randn(20, 8).bfloat16()
MAPS = torch.randn(1, 2, 20, 8).bfloat16()
ATTENTION = torch.randn(1, 2, 20, 20).bfloat16()
CODE, WEIGHTS = torch.randn(1, 20, 3).bfloat16(), torch.rand(1, 20, 9)
FP32, PAIRS = X.float(), hk.PairMask.random(0.2, (20, 20), 1)
# Normalised rows are fp32 on a CPU, and operands of two dtypes are promoted; the sums of a mix are no products.
TAKEN = {
    "hidden_positives": lambda b: hk.hidden_positives(X, FP32, backend=b).to_dense().float().mean(),
    "masked_contrastive_loss": lambda b: hk.masked_contrastive_loss(X, PAIRS, backend=b),
    "hidden_positive_loss": lambda b: hk.hidden_positive_loss(X, FP32, FP32, seed=1, backend=b),
    "supervised_contrastive_loss": lambda b: hk.supervised_contrastive_loss(X, torch.arange(20) % 3, backend=b),
    "neighbor_density": lambda b: hk.neighbor_density(FP32, X, backend=b),
    "topk_similarity": lambda b: hk.topk_similarity(FP32, X, 2, backend=b).__getitem__(0),
    "neighbor_weights": lambda b: hk.neighbor_weights(ATTENTION, (4, 5), backend=b),
    "neighbor_mix": lambda b: hk.neighbor_mix(CODE, WEIGHTS, (4, 5), backend=b).float(),
}
REFUSED = {
    "max_similarity": lambda b: hk.max_similarity(X, X, backend=b),
    "pairs_above": lambda b: hk.pairs_above(X, FP32[:, 0], backend=b),
    "assign_clusters": lambda b: hk.assign_clusters(X, FP32[:3], backend=b),
    "kmeans": lambda b: hk.kmeans(X, 2, backend=b),
    "neighbor_weights_qk": lambda b: hk.neighbor_weights_qk(MAPS, MAPS, (4, 5), backend=b),
}


@pytest.mark.parametrize("name", REFUSED)
def test_products_of_bf16_are_refused(name):
    with pytest.raises(TypeError, match="^bfloat16: Triton's interpreter multiplies it wrongly"):
        REFUSED[name]("triton")
    REFUSED[name]("reference")


@pytest.mark.parametrize("name", TAKEN)
def test_the_rest_is_right(name):
    torch.testing.assert_close(TAKEN[name]("triton"), TAKEN[name]("reference"), rtol=1e-2, atol=1e-3)
