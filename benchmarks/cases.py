"""The registry: what is measured, on which inputs, by whom.

A case has contenders: functions of the case's inputs, each one repetition of the same job. Its `flop` (or `nbytes`) is
the arithmetic the job needs when nothing is done twice, the same number for every contender, so rates compare as
times do. This module is imported by the worker processes only; importing it imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hpkernels
from benchmarks import published
from benchmarks.features import Batch, make_attention, make_batch
from benchmarks.plan import Shape

HEAD_WEIGHT = 0.5
NEIGHBOURS = 16
PANEL = 392  # rows of one product of the torch.mm peers: a triangle of panels wastes few products, each large enough

Contender = Callable[[Any], object]


@dataclass(frozen=True)
class Case:
    title: str
    inputs: Callable[[Shape, str, torch.dtype], Any]
    contenders: dict[str, Contender]
    flop: Callable[[Shape], float] | None = None
    nbytes: Callable[[Shape, int], float] | None = None  # the int is the bytes of one number


def search_flop(shape: Shape) -> float:
    """Upper triangles of both similarity matrices and both products with the pools."""
    return (shape.rows**2 + 2 * shape.rows * shape.pool) * (shape.channels + shape.code)


def step_flop(shape: Shape, rate: float) -> float:
    """Search, and for two streams the logits of the denominator and the products of their gradient.

    Under random columns G is not symmetric (both G x and G^T x are needed); the positives, data-dependent and few,
    are left out. Logits computed again in the backward pass do not count either.
    """
    products = 4 if rate == 1 else 6
    return search_flop(shape) + 2 * products * rate * shape.rows**2 * shape.code


def step(batch: Batch, loss: Callable[..., Tensor], rate: float, **options) -> Tensor:
    """Forward and backward of the loss of both streams, search included."""
    batch.z.grad = batch.z_local.grad = None
    value = loss(
        batch.z,
        batch.features,
        batch.pool,
        z_local=batch.z_local,
        head_features=batch.head_features,
        head_pool=batch.head_pool,
        head_weight=HEAD_WEIGHT,
        tokens_per_image=batch.tokens,
        negative_rate=rate,
        **options,
    )
    value.backward()
    return value.detach()


def _step_case(rate: float, peers: dict[str, Contender]) -> Case:
    ours = {"hpkernels": lambda batch: step(batch, hpkernels.hidden_positive_loss, rate)}
    twin = {"published": lambda batch: step(batch, published.hidden_positive_loss, rate)}
    return Case(
        title=f"step, rho {rate:g}",
        inputs=step_inputs,
        contenders=ours | twin | peers,
        flop=lambda shape: step_flop(shape, rate),
    )


def step_inputs(shape: Shape, device: str, dtype: torch.dtype) -> Batch:
    return make_batch(
        shape.images, shape.grid, channels=shape.channels, code=shape.code, pool=shape.pool, device=device, dtype=dtype
    )


@dataclass
class _SearchBatch:
    batch: Batch
    panel: Tensor = field(init=False)

    def __post_init__(self) -> None:
        x = self.batch.features
        self.panel = torch.empty(PANEL * max(x.shape[0], self.batch.pool.shape[0]), device=x.device, dtype=x.dtype)


def _search_inputs(shape: Shape, device: str, dtype: torch.dtype) -> _SearchBatch:
    return _SearchBatch(step_inputs(shape, device, dtype))


def _search_hpkernels(inputs: _SearchBatch) -> object:
    batch = inputs.batch
    return (
        hpkernels.hidden_positives(batch.features, batch.pool),
        hpkernels.hidden_positives(batch.head_features, batch.head_pool),
    )


def _search_products(inputs: _SearchBatch) -> None:
    """The similarity products alone, panel by panel into one buffer: what any search by library products pays."""
    batch = inputs.batch
    for x, pool in ((batch.features, batch.pool), (batch.head_features, batch.head_pool)):
        for start in range(0, x.shape[0], PANEL):
            rows = x[start : start + PANEL]
            for keys in (pool, x[start:]):
                out = inputs.panel[: rows.shape[0] * keys.shape[0]].view(rows.shape[0], keys.shape[0])
                torch.mm(rows, keys.T, out=out)


@dataclass
class _MixInputs:
    code: Tensor
    attention: Tensor
    grad: Tensor
    grid: tuple[int, int]


def _mix_inputs(shape: Shape, device: str, dtype: torch.dtype) -> _MixInputs:
    generator = torch.Generator().manual_seed(1)
    size = (shape.images, shape.tokens, shape.code)
    code, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    attention = make_attention(shape.images, shape.grid, heads=shape.heads, device=device, dtype=dtype)
    return _MixInputs(code.requires_grad_(), attention, grad, shape.grid)


def _mix(function: Callable[..., Tensor]) -> Contender:
    def run(inputs: _MixInputs) -> Tensor:
        inputs.code.grad = None
        mixed = function(inputs.code, inputs.attention, inputs.grid)
        mixed.backward(inputs.grad)
        return mixed.detach()

    return run


def _mix_bytes(shape: Shape, size: int) -> float:
    """Attention read once; code read and mixed code written; the same again for their gradients."""
    return size * (shape.images * shape.heads * shape.tokens**2 + 4 * shape.rows * shape.code)


def _topk_inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    queries = step_inputs(shape, device, dtype).features
    other = make_batch(
        shape.images, shape.grid, channels=shape.channels, code=8, pool=1, seed=1, device=device, dtype=dtype
    )
    return queries, other.features


def _copy_inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    source = torch.ones(1 << 26, device=device, dtype=dtype)
    return source, torch.empty_like(source)


CASES: dict[str, Case] = {
    "step_rho_0.02": _step_case(0.02, {}),
    "step_rho_1": _step_case(1.0, {}),
    "search": Case(
        title="both searches and pools",
        inputs=_search_inputs,
        contenders={"hpkernels": _search_hpkernels, "torch.mm": _search_products},
        flop=search_flop,
    ),
    "local_mix": Case(
        title="local_mix",
        inputs=_mix_inputs,
        contenders={"hpkernels": _mix(hpkernels.local_mix), "published": _mix(published.local_mix)},
        nbytes=_mix_bytes,
    ),
    "topk": Case(
        title=f"topk_similarity, k {NEIGHBOURS}",
        inputs=_topk_inputs,
        contenders={
            "hpkernels": lambda qk: hpkernels.topk_similarity(*qk, NEIGHBOURS),
            "torch.topk": lambda qk: torch.topk(qk[0] @ qk[1].T, NEIGHBOURS),
        },
        flop=lambda shape: 2.0 * shape.rows**2 * shape.channels,
    ),
    "product": Case(  # the ceiling of the rates: a library product of the search's own inner dimension
        title="torch.mm, N x C by C x N",
        inputs=_topk_inputs,
        contenders={"torch.mm": lambda qk: torch.mm(qk[0], qk[1].T)},
        flop=lambda shape: 2.0 * shape.rows**2 * shape.channels,
    ),
    "copy": Case(
        title="copy of 2^26 numbers",
        inputs=_copy_inputs,
        contenders={"torch": lambda tensors: tensors[1].copy_(tensors[0])},
        nbytes=lambda shape, size: 2.0 * size * (1 << 26),
    ),
}
