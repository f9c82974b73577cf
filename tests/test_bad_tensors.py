"""Each tensor of each public function is spoiled in turn: the error begins with its name, and with no other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hpkernels as hk

X, POOL = torch.randn(20, 6), torch.randn(7, 6)
LABELS, KEY_LABELS = torch.arange(20) % 3, torch.arange(7) % 3
MAPS = torch.randn(2, 1, 20, 6)
GRID = {"grid": (4, 5)}
PAIRS = hk.PairMask.random(0.3, (20, 20), 1)
# Good arguments; the tensors and masks among them are spoiled.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "max_similarity": (hk.max_similarity, dict(queries=X, keys=POOL)),
    "topk_similarity": (
        hk.topk_similarity, dict(queries=X, keys=POOL, k=2, query_groups=LABELS, key_groups=KEY_LABELS)
    ),
    "pairs_above": (hk.pairs_above, dict(x=X, thresholds=X[:, 0], keys=POOL, key_thresholds=POOL[:, 0])),
    "hidden_positives": (hk.hidden_positives, dict(features=X, pool=POOL)),
    "neighbor_density": (
        hk.neighbor_density, dict(features=X, memory=POOL, query_groups=LABELS, memory_groups=KEY_LABELS)
    ),
    "hidden_positive_loss": (
        hk.hidden_positive_loss,
        dict(z=X, features=X, pool=POOL, z_local=X, head_features=X, head_pool=POOL, head_weight=torch.tensor(0.3),
             negative_mask=X @ X.T > 0),
    ),
    "hidden_positive_loss without search": (
        hk.hidden_positive_loss, dict(z=X, features=X, pool=POOL, head_features=X, head_pool=POOL, seed=torch.tensor(1))
    ),
    "masked_contrastive_loss": (
        hk.masked_contrastive_loss,
        dict(z=X, positives=PAIRS, extra_positives=PAIRS, extra_weight=torch.tensor(0.3), negatives=PAIRS),
    ),
    "supervised_contrastive_loss": (
        hk.supervised_contrastive_loss, dict(z=X, labels=LABELS, keys=POOL, key_labels=KEY_LABELS)
    ),
    "supervised_contrastive_loss of images": (
        hk.supervised_contrastive_loss, dict(z=X, labels=LABELS, image_ids=LABELS)
    ),
    "assign_clusters": (hk.assign_clusters, dict(x=X, centroids=POOL)),
    "assign_clusters, spherical": (hk.assign_clusters, dict(x=X, centroids=POOL, spherical=True)),
    "outlier_distances": (hk.outlier_distances, dict(x=X, centroids=POOL)),
    "kmeans": (hk.kmeans, dict(x=X, k=7, init=POOL)),
    "kmeans, spherical": (hk.kmeans, dict(x=X, k=7, init=POOL, spherical=True)),
    "local_mix": (hk.local_mix, dict(code=X[None], attention=(X @ X.T)[None], **GRID)),
    "neighbor_weights": (hk.neighbor_weights, dict(attention=(X @ X.T)[None], **GRID)),
    "neighbor_weights_qk": (hk.neighbor_weights_qk, dict(queries=MAPS, keys=MAPS, **GRID)),
    "neighbor_mix": (hk.neighbor_mix, dict(code=X[None], weights=torch.rand(1, 20, 9), **GRID)),
    "neighbor_attention": (
        hk.neighbor_attention,
        dict(queries=X[None], keys=X[None], values=X[None], positions=X[:, :2], appearance=X[:, 2:],
             position_sigma=torch.tensor(0.3), appearance_sigma=torch.tensor(0.3)),
    ),
    "PairMask": (hk.PairMask, dict(bits=PAIRS.bits, columns=20)),
    "PairMask.from_dense": (hk.PairMask.from_dense, dict(dense=X > 0)),
    "PairMask.from_labels": (hk.PairMask.from_labels, dict(labels=LABELS)),
}  # fmt: skip
FINITE = {"thresholds": -torch.inf, "key_thresholds": torch.inf}  # numbers all the same


def with_one(x: Tensor, value: float) -> Tensor:
    spoiled = x.clone()
    spoiled.view(-1)[-1] = value
    return spoiled


def spoilt(name: str, good: object) -> dict[str, object]:
    """Bad values in the place of a good one, by what is wrong with them."""
    if isinstance(good, hk.PairMask):
        other_device = hk.PairMask(good.bits.to("meta"), good.columns)
        return {"text": "text", "a tensor": good.to_dense(), "shape": hk.PairMask.random(0.3, (20, 19), 1),
                "device": other_device}  # fmt: skip
    if not isinstance(good, Tensor):
        return {}
    bad = {"text": "text", "complex": good.to(torch.complex64), "sparse": good.to_sparse()} if good.ndim else {
        "text": "text", "complex": good.to(torch.complex64)
    }  # fmt: skip
    bad["rank"] = good[None, None, None]
    if good.is_floating_point():
        bad |= {"nan": with_one(good, torch.nan), "infinite": with_one(good, torch.inf)}
        if name in FINITE:
            bad["infinite"] = "allowed"
    return bad


CASES = [
    (call, name, kind)
    for call, (_, arguments) in CALLS.items()
    for name, good in arguments.items()
    for kind in spoilt(name, good)
]


def test_every_public_function_is_here():
    functions = {name for name in hk.__all__ if inspect.isfunction(getattr(hk, name))}
    assert functions <= {call.split(",")[0].split(" ")[0] for call in CALLS}


@pytest.mark.parametrize("call, name, kind", CASES, ids=lambda part: part)
def test_the_error_names_the_argument(call, name, kind, backend):
    function, arguments = CALLS[call]
    bad = spoilt(name, arguments[name])[kind]
    if "backend" in inspect.signature(function).parameters:
        arguments = arguments | {"backend": backend}
    function(**arguments)
    if bad == "allowed":
        function(**arguments | {name: with_one(arguments[name], FINITE[name])})
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments | {name: bad})
    assert str(caught.value).startswith((f"{name}: ", f"{name}, "))


@pytest.mark.parametrize("name", ["x", "centroids"])
def test_distances_that_are_no_numbers(name):
    """Finite rows and centroids, one of them so large that its square is not."""
    arguments = {"x": X, "centroids": POOL}
    arguments[name] = arguments[name] * 1e30
    with pytest.raises(ValueError, match=f"^{name}: expected numbers"):
        hk.assign_clusters(**arguments)
    with pytest.raises(ValueError, match=f"^{'init' if name == 'centroids' else 'x'}: expected numbers"):
        hk.kmeans(arguments["x"], 7, init=arguments["centroids"])
    assert hk.assign_clusters(**arguments, spherical=True).distances.isfinite().all()
