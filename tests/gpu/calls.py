"""The public functions on inputs whose decisions no rounding can turn: what the tests on a GPU call.

Patches of a few classes, a pool between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

import hpkernels as hk

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ODD = ((11, 13), 5, 96, 72, 3)  # no multiple of any tile
DEFAULT = ((28, 28), 2, 384, 512, 6)  # the tokens, and the widths, of hpseg's default: 224 pixels by ViT-S/8
CLASSES = 13

Answer = dict[str, Tensor]


@dataclass
class Inputs:
    """Of every call; all on one device, vectors in one dtype."""

    features: Tensor
    pool: Tensor
    head_features: Tensor
    head_pool: Tensor
    z: Tensor
    z_local: Tensor
    thresholds: Tensor
    key_thresholds: Tensor
    attention: Tensor
    code: Tensor
    grad_code: Tensor
    head_weight: Tensor
    labels: Tensor
    seed: Tensor
    queries: Tensor
    keys: Tensor
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        placed = {"grid": self.grid}
        for name in self.tensors():
            x = getattr(self, name)
            placed[name] = x.to(device, dtype, copy=True) if x.is_floating_point() else x.to(device, copy=True)
        return Inputs(**placed)

    def copy_(self, other: Inputs) -> None:
        for name in self.tensors():
            getattr(self, name).copy_(getattr(other, name))

    @staticmethod
    def tensors() -> list[str]:
        return [field.name for field in fields(Inputs) if field.name != "grid"]


@functools.cache
def make(dtype: torch.dtype, seed: int = 0, width: int | None = None, size: tuple = ODD) -> Inputs:
    """fp64 inputs on the CPU that hold numbers of `dtype`. size: grid, images, channels, width of a code, heads."""
    grid, images, channels, code, heads = size
    width, tokens = width or code, grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    n = images * tokens
    labels = torch.randint(CLASSES, (n,), generator=generator)

    def space(columns: int) -> tuple[Tensor, Tensor]:
        classes = torch.linalg.qr(normal(columns, CLASSES)).Q.T
        between = torch.stack([torch.randperm(CLASSES, generator=generator)[:2] for _ in range(150)])
        rows = F.normalize(classes[labels] + 0.1 * normal(n, columns) / columns**0.5, dim=1)
        return rows, F.normalize(classes[between].sum(1), dim=1)

    (features, pool), (head_features, head_pool) = space(channels), space(64)
    inputs = Inputs(
        features=features, pool=pool, head_features=head_features, head_pool=head_pool,
        z=normal(n, width), z_local=normal(n, width),
        thresholds=torch.full((n,), 0.6), key_thresholds=torch.full((len(pool),), 0.55),
        attention=normal(images, heads, tokens, tokens), code=normal(images, tokens, 40),
        grad_code=normal(images, tokens, 40),
        head_weight=torch.tensor(0.5), labels=labels, seed=torch.tensor(11 + seed),
        queries=normal(images, heads, tokens, 64), keys=normal(images, heads, tokens, 64), grid=grid,
    )  # fmt: skip
    return inputs.to(torch.device("cpu"), dtype).to(torch.device("cpu"), torch.float64)


def _search(function: Callable[..., tuple[Tensor, ...] | Tensor]) -> Callable[[Inputs, str | None], Answer]:
    def call(inputs: Inputs, backend: str | None) -> Answer:
        found = function(inputs, backend)
        return {str(i): x for i, x in enumerate(found if isinstance(found, tuple) else (found,))}

    return call


def _loss(**options) -> Callable[[Inputs, str | None], Answer]:
    def call(inputs: Inputs, backend: str | None) -> Answer:
        z, z_local = (x.detach().requires_grad_() for x in (inputs.z, inputs.z_local))
        loss = hk.hidden_positive_loss(
            z, inputs.features, inputs.pool, z_local=z_local, head_features=inputs.head_features,
            head_pool=inputs.head_pool, head_weight=inputs.head_weight, tokens_per_image=inputs.tokens,
            seed=inputs.seed, backend=backend, **options,
        )  # fmt: skip
        return dict(
            zip(("loss", "gradient", "local gradient"), (loss.detach(), *torch.autograd.grad(loss, (z, z_local))))
        )

    return call


def _supcon(inputs: Inputs, backend: str | None) -> Answer:
    z = inputs.z.detach().requires_grad_()
    pairs = hk.PairMask.from_labels(inputs.labels)
    loss = hk.masked_contrastive_loss(
        z, pairs, temperature=0.1, base_temperature=0.1, weighting="anchors", backend=backend
    )
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, z)[0]}


def _by_label(form: str, bank: bool) -> Callable[[Inputs, str | None], Answer]:
    """Other images only; against itself, or against a bank whose rows get a gradient, too."""

    def call(inputs: Inputs, backend: str | None) -> Answer:
        z, keys = (x.detach().requires_grad_() for x in (inputs.z, inputs.z_local))
        images = torch.arange(len(z), device=z.device) // inputs.tokens
        options = {"image_ids": images}
        if bank:
            options = {"keys": keys, "key_labels": inputs.labels, "image_ids": (images, images)}
        loss = hk.supervised_contrastive_loss(
            z, inputs.labels, temperature=0.1, ignore_index=3, form=form, backend=backend, **options
        )
        gradients = torch.autograd.grad(loss, (z, keys) if bank else (z,))
        return {"loss": loss.detach()} | dict(zip(("gradient", "of keys"), gradients))

    return call


def _density(inputs: Inputs, backend: str | None) -> Tensor:
    groups = torch.arange(len(inputs.pool), device=inputs.pool.device) % 3
    return hk.neighbor_density(
        inputs.features, inputs.pool, query_groups=inputs.labels % 3, memory_groups=groups, backend=backend
    )


def _given_pairs(inputs: Inputs, backend: str | None) -> Answer:
    """Positives that are not symmetric, with columns of the caller's."""
    z = inputs.z.detach().requires_grad_()
    n = len(z)
    positives, extra = (hk.PairMask.random(rate, (n, n), inputs.seed + 1, backend=backend) for rate in (0.02, 0.01))
    loss = hk.masked_contrastive_loss(
        z, positives, extra_positives=extra, extra_weight=inputs.head_weight, tokens_per_image=inputs.tokens,
        backend=backend, negatives=hk.PairMask.random(0.3, (inputs.tokens, n), inputs.seed, backend=backend),
    )  # fmt: skip
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, z)[0]}


def _neighbor_mix(inputs: Inputs, backend: str | None) -> Answer:
    code = inputs.code.detach().requires_grad_()
    weights = hk.neighbor_weights(inputs.attention, inputs.grid, backend=backend).detach().requires_grad_()
    mixed = hk.neighbor_mix(code, weights, inputs.grid, backend=backend)
    gradients = torch.autograd.grad(mixed, (code, weights), inputs.grad_code)
    return {"weights": weights.detach(), "mixed": mixed.detach(), "of code": gradients[0], "of weights": gradients[1]}


def _bits(inputs: Inputs, backend: str | None) -> Answer:
    n = len(inputs.z)
    mask = hk.PairMask.random(0.3, (inputs.tokens, n), inputs.seed, backend=backend)
    return {"random": mask.bits, "transposed": mask.T.bits, "counted": mask.sum(1), "by column": mask.sum(0)}


CALLS: dict[str, Callable[[Inputs, str | None], Answer]] = {
    "max_similarity": _search(lambda i, b: hk.max_similarity(i.features, i.pool, backend=b)),
    "topk_1": _search(lambda i, b: hk.topk_similarity(i.z, i.z_local, 1, backend=b)),
    "topk_16": _search(lambda i, b: hk.topk_similarity(i.z, i.z, 16, exclude_self=True, backend=b)),
    "topk_200": _search(lambda i, b: hk.topk_similarity(i.z, i.z_local, 200, backend=b)),
    "topk_groups": _search(
        lambda i, b: hk.topk_similarity(i.z, i.z, 8, query_groups=i.labels, key_groups=i.labels, backend=b)
    ),
    "pairs_above": _search(lambda i, b: hk.pairs_above(i.features, i.thresholds, backend=b).bits),
    "pairs_above_keys": _search(
        lambda i, b: hk.pairs_above(
            i.features, i.thresholds, keys=i.pool, key_thresholds=i.key_thresholds, backend=b
        ).bits
    ),
    "hidden_positives": _search(lambda i, b: hk.hidden_positives(i.features, i.pool, backend=b).bits),
    "loss_sparse": _loss(negative_rate=0.05),
    "loss_dense": _loss(negative_rate=0.5),
    "loss_all": _loss(negative_rate=1.0),
    "loss_separate": _loss(negative_rate=0.05, weighting="separate"),
    "supcon": _supcon,
    "by_label_supcon": _by_label("supcon", False),
    "by_label_supcon_bank": _by_label("supcon", True),
    "by_label_per_positive": _by_label("per_positive", False),
    "by_label_per_positive_bank": _by_label("per_positive", True),
    "neighbor_density": _search(_density),
    "assign_clusters": _search(lambda i, b: tuple(hk.assign_clusters(i.features, i.features[:20], backend=b))),
    "assign_clusters_many": _search(lambda i, b: tuple(hk.assign_clusters(i.features, i.features[:150], backend=b))),
    "assign_clusters_one": _search(
        lambda i, b: tuple(hk.assign_clusters(i.z, i.z_local[:1], spherical=True, backend=b))
    ),
    "given_pairs": _given_pairs,
    "neighbor_mix": _neighbor_mix,
    "local_mix": _search(lambda i, b: hk.local_mix(i.code, i.attention, i.grid, backend=b)),
    "neighbor_weights_qk": _search(lambda i, b: hk.neighbor_weights_qk(i.queries, i.keys, i.grid, backend=b)),
    "bits": _bits,
}  # fmt: skip
