"""The kinds of work: inputs, contenders, and the arithmetic each needs.

A contender is a function of the inputs, one repetition of the job; each does the same job. `flop` is the arithmetic of
the job when nothing is done twice, by inner dimension, and `nbytes` its memory traffic: the same numbers for every
contender, so rates compare as times do. Imported by the worker processes only, as importing it imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import hpkernels
from benchmarks import label_losses, peers, plain, published
from benchmarks.features import Batch, make_attention, make_batch
from benchmarks.kinds import Contender, Kind, make_shaped, ours
from benchmarks.plan import (
    CLUSTERS,
    COPY_NUMBERS,
    GROUPS,
    HEAD_CHANNELS,
    ITERATIONS,
    NEIGHBOURS,
    SCALES,
    STREAMS,
    Shape,
)  # fmt: skip

HEAD_WEIGHT = 0.5
PANEL = 392  # rows of one product of the torch.mm peers: a triangle of panels wastes few products, each large enough

# ------------------------------------------------------------------ a training step


def search_flop(shape: Shape) -> dict[int, float]:
    """Upper triangles of both similarity matrices and both products with the pools."""
    pairs = float(shape.rows**2 + 2 * shape.rows * shape.pool)
    return _sum({shape.channels: pairs * shape.channels}, {shape.code: pairs * shape.code})


def step_flop(shape: Shape) -> dict[int, float]:
    """Search, and for two streams the logits of the denominator and the products of their gradient.

    Under random columns G is not symmetric (both G x and G^T x are needed); the positives, data-dependent and few,
    are left out. Logits computed again in the backward pass do not count either.
    """
    products = 2 if shape.rate == 1 else 3
    loss = STREAMS * products * 2.0 * shape.rate * shape.rows**2 * shape.code
    return _sum(search_flop(shape), {shape.code: loss})


def _sum(*parts: dict[int, float]) -> dict[int, float]:
    return {k: sum(part.get(k, 0.0) for part in parts) for part in parts for k in part}


@dataclass
class StepInputs:
    batch: Batch
    rate: float


def step_inputs(shape: Shape, device: str, dtype: torch.dtype) -> StepInputs:
    return StepInputs(make_shaped(shape, device, dtype), shape.rate)


def step(inputs: StepInputs, loss: Callable[..., Tensor], **options) -> Tensor:
    """Forward and backward of the loss of both streams, search included."""
    batch = inputs.batch
    batch.z.grad = batch.z_local.grad = None
    value = loss(batch.z, batch.features, batch.pool, z_local=batch.z_local, **_common(inputs), **options)
    value.backward()
    return value.detach()


def _common(inputs: StepInputs) -> dict:
    batch = inputs.batch
    return {
        "head_features": batch.head_features,
        "head_pool": batch.head_pool,
        "head_weight": HEAD_WEIGHT,
        "tokens_per_image": batch.tokens,
        "negative_rate": inputs.rate,
    }


def _step_hpkernels(inputs: StepInputs, backend: str | None) -> Tensor:
    return step(inputs, hpkernels.hidden_positive_loss, seed=inputs.batch.seed, backend=backend)


def _step_published(compiled: bool) -> Contender:
    return lambda inputs: step(
        inputs, published.hidden_positive_loss, negative_mask=inputs.batch.mask, compiled=compiled
    )


def _step_chunked(compiled: bool) -> Contender:
    def run(inputs: StepInputs) -> Tensor:
        batch = inputs.batch
        batch.z.grad = batch.z_local.grad = None
        return plain.hidden_positive_step(
            [batch.z, batch.z_local], batch.features, batch.pool, negative_mask=batch.mask, compiled=compiled,
            **_common(inputs),
        )  # fmt: skip

    return run


# ------------------------------------------------------------------ search


@dataclass
class SearchInputs:
    batch: Batch
    panel: Tensor = field(init=False)

    def __post_init__(self) -> None:
        x = self.batch.features
        self.panel = torch.empty(PANEL * max(x.shape[0], self.batch.pool.shape[0]), device=x.device, dtype=x.dtype)

    @property
    def spaces(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.batch.features, self.batch.pool), (self.batch.head_features, self.batch.head_pool)]


def _search_inputs(shape: Shape, device: str, dtype: torch.dtype) -> SearchInputs:
    return SearchInputs(make_shaped(shape, device, dtype))


def _search_hpkernels(inputs: SearchInputs, backend: str | None) -> list[hpkernels.PairMask]:
    return [hpkernels.hidden_positives(*space, backend=backend) for space in inputs.spaces]


def _search_products(inputs: SearchInputs) -> None:
    """The similarity products alone, panel by panel into one buffer: what any search by library products pays."""
    for x, pool in inputs.spaces:
        for start in range(0, x.shape[0], PANEL):
            rows = x[start : start + PANEL]
            for keys in (pool, x[start:]):
                out = inputs.panel[: rows.shape[0] * keys.shape[0]].view(rows.shape[0], keys.shape[0])
                torch.mm(rows, keys.T, out=out)


# ------------------------------------------------------------------ local mixing


@dataclass
class MixInputs:
    code: Tensor
    attention: Tensor | tuple[Tensor, Tensor]  # logits, or queries and keys
    grad: Tensor
    grid: tuple[int, int]

    @property
    def logits(self) -> Tensor:
        if isinstance(self.attention, Tensor):
            return self.attention
        queries, keys = self.attention
        return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5


def _mix_inputs(shape: Shape, device: str, dtype: torch.dtype) -> MixInputs:
    generator = torch.Generator().manual_seed(1)
    size = (shape.images, shape.tokens, shape.code)
    code, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    attention = make_attention(shape.images, shape.grid, heads=shape.heads, device=device, dtype=dtype)
    return MixInputs(code.requires_grad_(), attention, grad, shape.grid)


def _mix_qk_inputs(shape: Shape, device: str, dtype: torch.dtype) -> MixInputs:
    inputs = _mix_inputs(shape, device, dtype)
    generator = torch.Generator().manual_seed(2)
    size = (shape.images, shape.heads, shape.tokens, HEAD_CHANNELS)
    inputs.attention = tuple(torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    return inputs


def _mix(function: Callable[[MixInputs], Tensor]) -> Contender:
    def run(inputs: MixInputs) -> Tensor:
        inputs.code.grad = None
        mixed = function(inputs)
        mixed.backward(inputs.grad)
        return mixed.detach()

    return run


def _mix_hpkernels(inputs: MixInputs, backend: str | None) -> Tensor:
    return _mix(lambda m: hpkernels.local_mix(m.code, m.attention, m.grid, backend=backend))(inputs)


def _mix_qk_hpkernels(inputs: MixInputs, backend: str | None) -> Tensor:
    def run(m: MixInputs) -> Tensor:
        weights = hpkernels.neighbor_weights_qk(*m.attention, m.grid, backend=backend)
        return hpkernels.neighbor_mix(m.code, weights, m.grid, backend=backend)

    return _mix(run)(inputs)


MIX_PEERS: dict[str, Contender] = {
    "published": _mix(lambda m: published.local_mix(m.code, m.logits, m.grid)),
    "torch": _mix(lambda m: plain.local_mix(m.code, m.logits, m.grid)),
}


def _mix_bytes(shape: Shape, size: int) -> float:
    """Attention read once; code read and mixed code written; the same again for their gradients."""
    return float(size * (shape.images * shape.heads * shape.tokens**2 + 4 * shape.rows * shape.code))


# ------------------------------------------------------------------ density, k-means


@dataclass
class DensityInputs:
    features: Tensor
    memory: Tensor
    groups: Tensor
    memory_groups: Tensor


def _density_inputs(shape: Shape, device: str, dtype: torch.dtype) -> DensityInputs:
    memory = _features(replace(shape, images=-(-shape.pool // shape.tokens)), 1, device, dtype)[: shape.pool]
    classes = (torch.arange(rows, device=device) % GROUPS for rows in (shape.rows, shape.pool))
    return DensityInputs(_features(shape, 0, device, dtype), memory.clone(), *classes)


def _density_hpkernels(inputs: DensityInputs, backend: str | None) -> Tensor:
    return hpkernels.neighbor_density(
        inputs.features, inputs.memory, scales=SCALES, query_groups=inputs.groups, memory_groups=inputs.memory_groups,
        backend=backend,
    )  # fmt: skip


def _density_plain(by_group: bool) -> Contender:
    return lambda inputs: plain.density(
        inputs.features, inputs.memory, inputs.groups, inputs.memory_groups, SCALES, by_group=by_group
    )


@dataclass
class KmeansInputs:
    x: Tensor
    rows: Tensor  # of x, that are the first centroids

    def __post_init__(self) -> None:
        self.start = self.x[self.rows]


def _kmeans_inputs(shape: Shape, device: str, dtype: torch.dtype) -> KmeansInputs:
    x = _features(shape, 0, device, dtype)
    return KmeansInputs(x, torch.arange(len(x), device=device)[:: max(1, len(x) // CLUSTERS)][:CLUSTERS])


def _kmeans_hpkernels(inputs: KmeansInputs, backend: str | None) -> Tensor:
    return hpkernels.kmeans(
        inputs.x, len(inputs.start), init=inputs.start, iterations=ITERATIONS, tolerance=0, backend=backend
    ).centroids


# ------------------------------------------------------------------ top-k and the ceilings


def _topk_inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(_features(shape, seed, device, dtype) for seed in range(2))


def _features(shape: Shape, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    return make_batch(
        shape.images, shape.grid, channels=shape.channels, code=8, pool=1, seed=seed, device=device, dtype=dtype
    ).features


def _pairs_flop(shape: Shape) -> dict[int, float]:
    return {shape.channels: 2.0 * shape.rows**2 * shape.channels}


def _product_inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Random rows and columns (zeros run faster than data), and the room for their product."""
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(shape.rows, shape.channels, generator=generator).to(device, dtype) for _ in range(2))
    return [a, b.T, torch.empty(shape.rows, shape.rows, device=device, dtype=dtype)]


def _copy_inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    source = torch.ones(COPY_NUMBERS, device=device, dtype=dtype)
    return source, torch.empty_like(source)


KINDS: dict[str, Kind] = {
    "step": Kind(
        inputs=step_inputs,
        contenders=ours(_step_hpkernels) | {
            "published": _step_published(compiled=False),
            "published-compiled": _step_published(compiled=True),
            "chunked": _step_chunked(compiled=False),
            "chunked-compiled": _step_chunked(compiled=True),
        },
        flop=step_flop,
    ),
    "search": Kind(
        inputs=_search_inputs,
        contenders=ours(_search_hpkernels) | {
            "torch.mm": _search_products,
            "chunked": lambda s: [plain.hidden_positives(*space) for space in s.spaces],
        },
        flop=search_flop,
    ),
    "topk": Kind(
        inputs=_topk_inputs,
        contenders=ours(lambda qk, backend: hpkernels.topk_similarity(*qk, NEIGHBOURS, backend=backend)) | {
            "torch.mm": lambda qk: qk[0] @ qk[1].T,
            "torch.topk": lambda qk: tuple(torch.topk(qk[0] @ qk[1].T, NEIGHBOURS)),
            "chunked": lambda qk: plain.topk(*qk, NEIGHBOURS),
            "faiss": lambda qk: peers.faiss_topk(*qk, NEIGHBOURS),
            "keops": lambda qk: peers.keops_topk(*(x.float() for x in qk), NEIGHBOURS),
        },
        flop=_pairs_flop,
    ),
    "local_mix": Kind(inputs=_mix_inputs, contenders=ours(_mix_hpkernels) | MIX_PEERS, nbytes=_mix_bytes),
    "local_mix_qk": Kind(  # the products of the attention are part of this job
        inputs=_mix_qk_inputs,
        contenders=ours(_mix_qk_hpkernels) | MIX_PEERS,
        flop=lambda shape: {HEAD_CHANNELS: 2.0 * shape.rows * shape.tokens * shape.heads * HEAD_CHANNELS},
    ),
    **label_losses.KINDS,
    "density": Kind(
        inputs=_density_inputs,
        contenders=ours(_density_hpkernels) | {
            "torch.topk": _density_plain(by_group=False),
            "chunked": _density_plain(by_group=True),
        },
        flop=lambda shape: {shape.channels: 2.0 * shape.rows * shape.pool / GROUPS * shape.channels},
    ),
    "kmeans": Kind(  # one pass more than iterations: the labels of the last centroids
        inputs=_kmeans_inputs,
        contenders=ours(_kmeans_hpkernels) | {
            "chunked": lambda inputs: plain.kmeans(inputs.x, inputs.start, ITERATIONS),
            "scikit-learn": lambda inputs: peers.sklearn_kmeans(inputs.x, inputs.start, ITERATIONS),
            "flash-kmeans": lambda inputs: peers.flash_kmeans(inputs.x, inputs.start, ITERATIONS),
            "fastkmeans": lambda inputs: peers.fastkmeans(inputs.x, inputs.rows, ITERATIONS),
        },
        flop=lambda shape: {shape.channels: (ITERATIONS + 1) * 2.0 * shape.rows * CLUSTERS * shape.channels},
    ),
    "product": Kind(
        inputs=_product_inputs,
        contenders={"torch.mm": lambda abc: torch.mm(abc[0], abc[1], out=abc[2])},
        flop=_pairs_flop,
    ),
    "copy": Kind(
        inputs=_copy_inputs,
        contenders={"torch": lambda tensors: tensors[1].copy_(tensors[0])},
        nbytes=lambda shape, size: 2.0 * size * COPY_NUMBERS,
    ),
}  # fmt: skip
