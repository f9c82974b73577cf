"""The arguments of the losses, checked: everything that can be wrong with them is found here, before any work."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import (
    LARGEST,
    check_choice,
    check_dense,
    check_finite,
    check_flag,
    check_float_tensor,
    check_int,
    check_positive,
    check_rate,
    describe,
    look_number,
)
from hpkernels.losses.panels import bits_bytes
from hpkernels.mining import check_rule
from hpkernels.pairs import as_seed

WEIGHTINGS = ("pairs", "anchors", "separate")


@dataclass
class Batch:
    """One process's patches, as rows."""

    streams: list[Tensor]  # z, or z and z_local: (n, D) each
    graphs: list[tuple[str, Tensor, str, Tensor | None]]  # names and rows of the features and the pool behind P, and Q
    tokens: int
    negative_rate: float
    seed: Tensor | None  # None where nothing is drawn
    backend: str
    options: dict[str, object] = field(default_factory=dict)  # what all ranks of a process group must agree on

    def describe(self) -> tuple[dict[str, int], dict[str, object]]:
        """(rows by name, options by name) for `ranks.meet`. Looks for non-finite numbers: later is too late."""
        sizes: dict[str, int] = {}
        options = dict(self.options)
        streams = dict(zip(("z", "z_local"), self.streams))
        inputs = streams | {name: x for graph in self.graphs for name, x in zip(graph[::2], graph[1::2])}
        for name in ("z", "z_local", "features", "pool", "head_features", "head_pool"):
            x = inputs.get(name)
            options[name] = "None" if x is None else f"vectors of length {x.shape[1]}, {x.dtype}, on {x.device.type}"
            if x is not None:
                check_finite(name, x)
                sizes[name] = x.shape[0]
        options["requires_grad"] = torch.is_grad_enabled() and any(x.requires_grad for x in self.streams)
        return sizes, options


def check_batch(
    z: Tensor,
    features: Tensor,
    pool: Tensor | None,
    z_local: Tensor | None,
    head_features: Tensor | None,
    head_pool: Tensor | None,
    head_weight: float | Tensor,
    positives_per_anchor: int | None,
    tokens_per_image: int | None,
    temperature: float,
    base_temperature: float,
    negative_rate: float,
    negative_mask: Tensor | None,
    weighting: str,
    head_in_denominator: bool,
    seed: int | Tensor | None,
    process_group: object,
    return_stats: bool,
    backend: str | None,
) -> Batch:
    """The arguments of `hidden_positive_loss` as a Batch, or the error that names the one that is wrong."""
    tokens = tokens_of(z, tokens_per_image)
    if process_group is not None and tokens_per_image is None and z.ndim == 2:
        raise ValueError("tokens_per_image: expected an int, or z of shape (B, T, D), with a process_group; got None")
    streams = streams_of(z, z_local)
    count = streams[0].shape[0]
    graphs = [("features", _rows("features", features, count, z), "pool", pool)]
    chosen = dispatch.choose(z.device, backend, *streams, features, pool, head_features, head_pool)
    rate = check_rate("negative_rate", negative_rate)
    check_loss_options(temperature, base_temperature, weighting)
    check_flag("head_in_denominator", head_in_denominator)
    head_features = _check_head(head_features, head_pool, head_weight, pool, count, z)
    if head_features is not None:
        graphs.append(("head_features", head_features, "head_pool", head_pool))
    for graph in graphs:
        check_rule(*graph, positives_per_anchor)
    check_flag("return_stats", return_stats)
    bits_bytes(z.device)  # finds a setting that is no number
    _check_negative_mask(negative_mask, z)
    drawn = negative_mask is None and 0.0 < rate < 1.0
    options: dict[str, object] = dict(
        tokens_per_image=tokens, positives_per_anchor=positives_per_anchor, temperature=temperature,
        base_temperature=base_temperature, negative_rate=rate, weighting=weighting,
        head_in_denominator=head_in_denominator,
        negative_mask="None" if negative_mask is None else f"shape {tuple(negative_mask.shape)}",
        head_weight="a tensor" if isinstance(head_weight, Tensor) else head_weight,
    )  # fmt: skip
    return Batch(streams, graphs, tokens, rate, as_seed(seed, z.device) if drawn else None, chosen, options)


def tokens_of(z: Tensor, tokens_per_image: int | None) -> int:
    check_float_tensor("z", z, ndim=(2, 3))
    count = z.shape[0] if z.ndim == 2 else z.shape[0] * z.shape[1]
    if tokens_per_image is None:
        return max(1, z.shape[1] if z.ndim == 3 else count)
    check_int("tokens_per_image", tokens_per_image)
    if z.ndim == 3 and tokens_per_image != z.shape[1]:
        raise ValueError(f"tokens_per_image: expected {z.shape[1]} as in z {tuple(z.shape)}, got {tokens_per_image}")
    if tokens_per_image < 1 or count % tokens_per_image:
        raise ValueError(f"tokens_per_image: expected a positive divisor of N = {count}, got {tokens_per_image}")
    return tokens_per_image


def streams_of(z: Tensor, z_local: Tensor | None) -> list[Tensor]:
    """z and z_local as (N, D) rows."""
    streams = [z]
    if z_local is not None:
        check_float_tensor("z_local", z_local, ndim=(2, 3), like=z)
        if z_local.shape != z.shape:
            raise ValueError(f"z_local: expected the shape of z {tuple(z.shape)}, got {describe(z_local)}")
        streams.append(z_local)
    return [s.flatten(0, 1) if s.ndim == 3 else s for s in streams]


def _check_negative_mask(mask: object, z: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"negative_mask: expected a bool tensor, got {describe(mask)}")
    check_dense("negative_mask", mask)
    if mask.device != z.device:
        raise ValueError(f"negative_mask: expected a tensor on {z.device}, got {describe(mask)}")


def _rows(name: str, x: Tensor, count: int, z: Tensor) -> Tensor:
    """Per-patch input as (N, C), N as in z."""
    check_float_tensor(name, x, ndim=(2, 3), like=z)
    rows = x.flatten(0, 1) if x.ndim == 3 else x
    if rows.shape[0] != count:
        raise ValueError(f"{name}: expected {count} rows as in z {tuple(z.shape)}, got {describe(x)}")
    return rows


def _check_head(
    head_features: Tensor | None,
    head_pool: Tensor | None,
    head_weight: float | Tensor,
    pool: Tensor | None,
    count: int,
    z: Tensor,
) -> Tensor | None:
    """head_features as (N, H), or None; they need a head_pool exactly when the features have a pool."""
    check_weight("head_weight", head_weight, "head_features", head_features, z)
    if head_features is None:
        if head_pool is not None:
            raise ValueError(f"head_pool: expected only together with head_features, got {describe(head_pool)}")
        return None
    if (pool is None) != (head_pool is None):
        expected = "None, as pool is None" if pool is None else "a pool for head_features, as pool is given"
        raise ValueError(f"head_pool: expected {expected}, got {describe(head_pool)}")
    return _rows("head_features", head_features, count, z)


def check_weight(name: str, weight: float | Tensor, pairs_name: str, pairs: object, z: Tensor) -> None:
    """Raise unless `weight` is a number from 0 to LARGEST, and 0 where there are no pairs that it is for. The number in
    a tensor is looked at where that takes no wait: on the CPU."""
    if isinstance(weight, Tensor):
        check_dense(name, weight)
        if weight.ndim != 0 or weight.is_complex() or weight.dtype == torch.bool:
            raise ValueError(f"{name}: expected a float or a 0-dim tensor, got {describe(weight)}")
        if weight.device not in (z.device, torch.device("cpu")):
            raise ValueError(f"{name}: expected a tensor on {z.device}, got {describe(weight)}")
        if pairs is None:
            raise ValueError(f"{name}: expected 0.0 without {pairs_name}, got {describe(weight)}")
        look_number(name, weight, 0.0, LARGEST)
        return
    if isinstance(weight, bool) or not isinstance(weight, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a float or a 0-dim tensor, got {weight!r}")
    if pairs is None and weight != 0:
        raise ValueError(f"{name}: expected 0.0 without {pairs_name}, got {weight}")
    if not torch.compiler.is_compiling() and not 0.0 <= weight <= LARGEST:
        raise ValueError(f"{name}: expected a finite number from 0 to {LARGEST:g}, got {weight}")


def check_loss_options(temperature: float, base_temperature: float, weighting: str) -> None:
    check_positive("temperature", temperature)
    check_positive("base_temperature", base_temperature)
    check_choice("weighting", weighting, WEIGHTINGS)
