"""The kinds of work that are losses of one (N, D) tensor by labels, or of two by their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import hpkernels
from benchmarks import peers, plain
from benchmarks.features import make_labels
from benchmarks.kinds import Contender, Kind, make_shaped, ours
from benchmarks.plan import Shape

TEMPERATURE = 0.1


class SupconInputs(NamedTuple):
    z: Tensor
    labels: Tensor


class InfonceInputs(NamedTuple):
    z: Tensor
    keys: Tensor  # key i is the positive of row i


def _supcon_inputs(shape: Shape, device: str, dtype: torch.dtype) -> SupconInputs:
    return SupconInputs(make_shaped(shape, device, dtype).z, make_labels(shape.images, shape.grid, device=device))


def _infonce_inputs(shape: Shape, device: str, dtype: torch.dtype) -> InfonceInputs:
    batch = make_shaped(shape, device, dtype)
    return InfonceInputs(batch.z, batch.z_local)


def _forward_and_backward(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Contender:
    """Of loss(*inputs, temperature)."""

    def run(inputs: SupconInputs | InfonceInputs) -> Tensor:
        for x in inputs:
            x.grad = None
        value = loss(*inputs, TEMPERATURE)
        value.backward()
        return value.detach()

    return run


def _supcon_hpkernels(inputs: SupconInputs, backend: str | None) -> Tensor:
    def loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return hpkernels.supervised_contrastive_loss(z, labels, temperature=temperature, backend=backend)

    return _forward_and_backward(loss)(inputs)


def _supcon_plain(chunked: bool, compiled: bool) -> Contender:
    def run(inputs: SupconInputs) -> Tensor:
        inputs.z.grad = None
        return plain.supcon_step(inputs.z, inputs.labels, TEMPERATURE, chunked=chunked, compiled=compiled)

    return run


def _infonce_hpkernels(inputs: InfonceInputs, backend: str | None) -> Tensor:
    def loss(z: Tensor, keys: Tensor, temperature: float) -> Tensor:
        labels = torch.arange(len(z), device=z.device)
        return hpkernels.supervised_contrastive_loss(
            z, labels, keys=keys, key_labels=labels, temperature=temperature, backend=backend
        )

    return _forward_and_backward(loss)(inputs)


KINDS: dict[str, Kind] = {
    "supcon": Kind(
        inputs=_supcon_inputs,
        contenders=ours(_supcon_hpkernels) | {
            "torch": _supcon_plain(chunked=False, compiled=False),
            "torch-compiled": _supcon_plain(chunked=False, compiled=True),
            "chunked": _supcon_plain(chunked=True, compiled=False),
            "chunked-compiled": _supcon_plain(chunked=True, compiled=True),
            "pytorch-metric-learning": _forward_and_backward(peers.metric_learning_supcon),
            "cut-cross-entropy": _forward_and_backward(peers.cut_cross_entropy_supcon),
            "inf-cl": _forward_and_backward(peers.inf_cl_supcon),
            "keops": _forward_and_backward(peers.keops_supcon),
        },
        flop=lambda shape: {shape.code: 2 * 2.0 * shape.rows**2 * shape.code},  # logits; the product of G + G^T
    ),
    "infonce": Kind(
        inputs=_infonce_inputs,
        contenders=ours(_infonce_hpkernels) | {
            "torch": _forward_and_backward(plain.infonce),
            "torch-linear-cross-entropy": _forward_and_backward(peers.torch_linear_cross_entropy),
            "cut-cross-entropy": _forward_and_backward(peers.cut_cross_entropy_infonce),
            "inf-cl": _forward_and_backward(peers.inf_cl_infonce),
            "siglip-kernel": _forward_and_backward(peers.siglip_kernel),
        },
        flop=lambda shape: {shape.code: 3 * 2.0 * shape.rows**2 * shape.code},  # logits; the products of G and G^T
    ),
}  # fmt: skip
