"""What people have at hand is taken as Python's numbers and bools are, or the error says what to write."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hpkernels as hk

X = torch.randn(24, 6)
PAIRS = hk.PairMask.random(0.3, (24, 24), 1)
# (function, arguments, numbers by name)
CALLS = {
    "hidden_positive_loss": (
        hk.hidden_positive_loss, dict(z=X, features=X, pool=X[:5], head_features=X, head_pool=X[:5]),
        dict(seed=3, temperature=0.5, base_temperature=0.25, negative_rate=0.5, tokens_per_image=8, head_weight=0.25),
    ),
    "nearest": (
        hk.hidden_positive_loss, dict(z=X, features=X, temperature=1.0),
        dict(positives_per_anchor=3, seed=1, negative_rate=1),
    ),
    "masked_contrastive_loss": (
        hk.masked_contrastive_loss, dict(z=X, positives=PAIRS, extra_positives=PAIRS),
        dict(extra_weight=0.5, temperature=0.5, base_temperature=0.25, tokens_per_image=8),
    ),
    "supervised_contrastive_loss": (
        hk.supervised_contrastive_loss, dict(z=X, labels=torch.arange(24) % 3), dict(temperature=0.5)
    ),
    "hidden_positives": (hk.hidden_positives, dict(features=X), dict(positives_per_anchor=3)),
    "topk_similarity": (hk.topk_similarity, dict(queries=X, keys=X), dict(k=3)),
    "kmeans": (hk.kmeans, dict(x=X), dict(k=3, seed=2, iterations=4, tolerance=0.5, restarts=2, batch_size=8)),
    "outlier_distances": (hk.outlier_distances, dict(x=X, centroids=X[:3]), dict(fraction=0.25)),
    "neighbor_density": (hk.neighbor_density, dict(features=X, memory=X[:9]), dict(scales=(2, 4))),
    "neighbor_weights": (
        hk.neighbor_weights, dict(attention=X.view(1, 12, 12)),
        dict(grid=(3, 4), sigma=2.0, low_quantile=0.25, high_quantile=0.75),
    ),
    "neighbor_attention": (
        hk.neighbor_attention, dict(queries=X[None], keys=X[None], values=X[None], positions=X[:, :2]),
        dict(position_sigma=0.5, scale=0.25),
    ),
    "random": (hk.PairMask.random, {}, dict(rate=0.5, shape=(8, 40), seed=3)),
    "from_labels": (hk.PairMask.from_labels, dict(labels=torch.arange(9) % 3), dict(ignore_index=1)),
    "PairMask": (hk.PairMask, dict(bits=PAIRS.bits), dict(columns=24)),
}  # fmt: skip


def numpys(value: object) -> list[object]:
    if isinstance(value, tuple):
        return [tuple(number(each) for each in value) for number in (np.int64, np.int32)]
    kinds = (np.int64, np.int32, np.uint8) if isinstance(value, int) else (np.float64, np.float32, np.float16)
    return [kind(value) for kind in kinds]


def answer(result: object) -> list[torch.Tensor]:
    if isinstance(result, hk.PairMask):
        return [result.bits]
    return [torch.as_tensor(part) for part in result] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", CALLS)
def test_numpy_scalars_are_numbers(name, backend, monkeypatch):
    monkeypatch.setenv("HPKERNELS_BACKEND", backend)
    function, arguments, numbers = CALLS[name]
    expected = answer(function(**arguments, **numbers))
    for number, value in numbers.items():
        for given in numpys(value):
            found = answer(function(**arguments, **numbers | {number: given}))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (number, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.float32, torch.int64])
def test_masks_of_numbers_are_refused_with_advice(dtype):
    mask = torch.ones(24, 24, dtype=dtype)
    for name, call in {
        "dense": lambda: hk.PairMask.from_dense(mask),
        "negative_mask": lambda: hk.hidden_positive_loss(X, X, X[:5], negative_mask=mask),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected a bool tensor.*; write mask.bool\(\) where"):
            call()


def test_a_numpy_bool_is_no_number():
    with pytest.raises(TypeError, match="^k: expected an int"):
        hk.topk_similarity(X, X, np.True_)
    with pytest.raises(TypeError, match="^temperature: expected a Python number > 0"):
        hk.supervised_contrastive_loss(X, torch.arange(24) % 3, temperature=np.True_)
