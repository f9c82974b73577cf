"""The interpreter's products of bf16 are garbage: every public function with a Triton kernel says so instead."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk

X = torch.randn(20, 8).bfloat16()
MAPS = torch.randn(1, 2, 20, 8).bfloat16()
ATTENTION = torch.randn(1, 2, 20, 20).bfloat16()
CODE, WEIGHTS = torch.randn(1, 20, 3).bfloat16(), torch.rand(1, 20, 9)
FP32 = X.float()
# (the argument that is named, the call)
CALLS = {
    "queries": lambda b: hk.max_similarity(X, X, backend=b),
    "keys": lambda b: hk.topk_similarity(FP32, X, 2, backend=b),
    "x": lambda b: hk.pairs_above(X, FP32[:, 0], backend=b),
    "features": lambda b: hk.hidden_positives(X, FP32, backend=b),
    "pool": lambda b: hk.hidden_positives(FP32, X, backend=b),
    "z": lambda b: hk.masked_contrastive_loss(X, hk.PairMask.random(0.2, (20, 20), 1), backend=b),
    "z (hidden_positive_loss)": lambda b: hk.hidden_positive_loss(X, FP32, FP32, seed=1, backend=b),
    "z (labels)": lambda b: hk.supervised_contrastive_loss(X, torch.arange(20) % 3, backend=b),
    "memory": lambda b: hk.neighbor_density(FP32, X, backend=b),
    "x (assign_clusters)": lambda b: hk.assign_clusters(X, FP32[:3], backend=b),
    "x (kmeans)": lambda b: hk.kmeans(X, 2, backend=b),
    "attention": lambda b: hk.neighbor_weights(ATTENTION, (4, 5), backend=b),
    "queries (weights)": lambda b: hk.neighbor_weights_qk(MAPS, MAPS, (4, 5), backend=b),
    "code": lambda b: hk.neighbor_mix(CODE, WEIGHTS, (4, 5), backend=b),
}


@pytest.mark.parametrize("name", CALLS)
def test_bf16_is_refused_by_name(name):
    argument = name.split()[0]
    with pytest.raises(TypeError, match=f"^{argument}: Triton's interpreter multiplies bfloat16 wrongly"):
        CALLS[name]("triton")
    CALLS[name]("reference")
