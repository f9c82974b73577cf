"""In torch.compile with dynamic shapes every public function is one graph for all sizes, or it fails at the ninth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hpkernels as hk

# More than torch's limit of recompilations, whole words of bits among them.
SIZES = [20, 32, 36, 44, 128, 52, 60, 96, 132, 256, 68]
CALLS: dict[str, Callable[..., object]] = {}


def call(function: Callable[..., object]) -> Callable[..., object]:
    CALLS[function.__name__] = function
    return function


@call
def max_similarity(x, y):
    return hk.max_similarity(x, y)


@call
def topk_similarity(x, y):
    return hk.topk_similarity(x, y, 3)


@call
def topk_similarity_in_groups(x, y, labels):
    return hk.topk_similarity(x, x, 3, exclude_self=True, query_groups=labels, key_groups=labels)


@call
def pairs_above(x, y):
    return hk.pairs_above(x, x[:, 0]).bits, hk.pairs_above(x, x[:, 0], keys=y).bits


@call
def hidden_positives(x, y):
    return hk.hidden_positives(x, y).bits, hk.hidden_positives(x, positives_per_anchor=3).bits


@call
def neighbor_density(x, y):
    return hk.neighbor_density(x, y)


@call
def from_dense(x, y):
    mask = hk.PairMask.from_dense(x @ y.T > 0)
    return mask.bits, (~mask).bits, mask.T.bits, mask.sum(0), mask.sum(1), mask.to_dense()


@call
def from_labels(x, y, labels):
    mask = hk.PairMask.from_labels(labels)
    return (mask & mask | mask).bits, mask.off_diagonal().bits, mask.sum()


@call
def random(x, y):
    return hk.PairMask.random(0.1, (x.shape[0], y.shape[0]), 3).bits


@call
def hidden_positive_loss(x, y):
    return hk.hidden_positive_loss(x, x, y, seed=1, tokens_per_image=4)


@call
def hidden_positive_loss_of_a_mask(x, y):
    return hk.hidden_positive_loss(x, x, y, negative_mask=x @ x.T > 1)


@call
def hidden_positive_loss_of_nearest(x, y):
    return hk.hidden_positive_loss(x, x, positives_per_anchor=3, seed=1, head_features=x, head_weight=0.5)


@call
def masked_contrastive_loss(x, y, labels):
    positives = hk.PairMask.from_labels(labels)
    return hk.masked_contrastive_loss(x, positives, negatives=hk.PairMask.from_dense(x @ x.T > 1))


@call
def supervised_contrastive_loss(x, y, labels):
    return hk.supervised_contrastive_loss(x, labels), hk.supervised_contrastive_loss(x, labels, form="per_positive")


@call
def assign_clusters(x, y):
    return hk.assign_clusters(x, y), hk.assign_clusters(x, y, spherical=True)


@call
def local_mix(x, y):
    height, code = x.shape[0] // 4, x[None]
    attention = (code @ code.transpose(1, 2))[:, None]
    return hk.local_mix(code, attention, (height, 4)), hk.local_mix(code, (code[:, None], code[:, None]), (height, 4))


@call
def neighbor_attention(x, y):
    code = x[None]
    return hk.neighbor_attention(code, code, code, x[:, :2], x[:, 2:])


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_for_all_sizes(name):
    function = CALLS[name]
    arguments = function.__code__.co_argcount

    def inputs(n: int) -> tuple[Tensor, ...]:
        return (torch.randn(n, 6), torch.randn(n - 3, 6), torch.arange(n) % 5 - 1)[:arguments]

    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in SIZES:
            given = inputs(n)
            torch.testing.assert_close(compiled(*given), function(*given))
