"""The arguments of the losses, checked: everything that can be wrong with them is found here, before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    extremes,
    look_finite,
    look_number,
    plain,
)
from hpkernels.losses.panels import bits_bytes
from hpkernels.mining import Graph, check_graph
from hpkernels.pairs import as_bools, as_seed

WEIGHTINGS = ("pairs", "anchors", "separate")


class Options(NamedTuple):
    """The options of `hidden_positive_loss`, as they are given."""

    tokens_per_image: int | None
    temperature: float
    base_temperature: float
    weighting: str
    negative_rate: float
    negative_mask: Tensor | None
    seed: int | Tensor | None
    head_weight: float | Tensor
    head_in_denominator: bool
    backend: str | None


@dataclass
class Batch:
    """One process's patches, as rows, and what to make of them."""

    streams: list[Tensor]  # z, or z and z_local: (n, D) each
    graphs: list[Graph]  # behind P, and behind Q if there is one
    tokens: int
    seed: Tensor | None  # None where nothing is drawn
    backend: str
    options: Options

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All that is given by rows, by the names of the arguments."""
        named = [*zip(("z", "z_local"), self.streams), *(part for graph in self.graphs for part in graph.inputs())]
        return {name: x for name, x in named if x is not None}

    def searched(self) -> list[Graph]:
        """The graphs whose pairs the loss depends on: not Q's where lambda is the number 0 and E holds no Q.

        In what torch.compile makes all of them, as a branch on lambda would be one more graph of its own.
        """
        given = self.options
        without_head = is_zero(given.head_weight) and not given.head_in_denominator
        return self.graphs[:1] if without_head else self.graphs

    def describe(self) -> tuple[dict[str, int], dict[str, object]]:
        """(rows by name, options that all ranks must agree on by name) for `ranks.meet`.

        Looks for non-finite numbers: later is too late.
        """
        given = self.options
        options: dict[str, object] = dict(
            tokens_per_image=self.tokens, positives_per_anchor=self.graphs[0].neighbors,
            temperature=given.temperature, base_temperature=given.base_temperature,
            negative_rate=float(given.negative_rate), weighting=given.weighting,
            head_in_denominator=given.head_in_denominator,
            negative_mask="None" if given.negative_mask is None else f"shape {tuple(given.negative_mask.shape)}",
            head_weight="a tensor" if isinstance(given.head_weight, Tensor) else given.head_weight,
        )  # fmt: skip
        sizes: dict[str, int] = {}
        inputs = self.inputs
        for name in ("z", "z_local", "features", "pool", "head_features", "head_pool"):
            x = inputs.get(name)
            options[name] = "None" if x is None else f"vectors of length {x.shape[1]}, {x.dtype}, on {x.device.type}"
            if x is not None:
                check_finite(name, x)
                sizes[name] = x.shape[0]
        options["requires_grad"] = torch.is_grad_enabled() and any(x.requires_grad for x in self.streams)
        return sizes, options


def witnesses_of(graphs: list[Graph]) -> list[Tensor]:
    """What a search does for its inputs beside finding pairs: it refuses bad numbers on the CPU, and hands on witnesses
    of them elsewhere."""
    given = [(name, x) for graph in graphs for name, x in graph.inputs() if x is not None]
    for name, x in given:
        look_finite(name, x)
    return [extremes(x) for _, x in given if not x.is_cpu]


def check_batch(z: Tensor, z_local: Tensor | None, graphs: list[Graph], options: Options, shared: bool) -> Batch:
    """The arguments of `hidden_positive_loss` as a Batch, or the error that names the one that is wrong.

    graphs: from `graphs_of`. shared: whether there is a process_group.
    """
    tokens = tokens_of(z, options.tokens_per_image)
    if shared and options.tokens_per_image is None and z.ndim == 2:
        raise ValueError("tokens_per_image: expected an int, or z of shape (B, T, D), with a process_group; got None")
    streams = streams_of(z, z_local)
    count = len(streams[0])
    graphs = [
        Graph(graph.name, _rows(graph.name, graph.features, count, z), graph.pool_name, graph.pool, graph.neighbors)
        for graph in graphs
    ]
    given = [x for graph in graphs for x in (graph.features, graph.pool)]
    chosen = dispatch.choose(z.device, options.backend, *streams, *given)
    rate = check_rate("negative_rate", options.negative_rate)
    check_loss_options(options.temperature, options.base_temperature, options.weighting)
    check_flag("head_in_denominator", options.head_in_denominator)
    head = graphs[1].features if len(graphs) > 1 else None
    check_weight("head_weight", options.head_weight, "head_features", head, z)
    for graph in graphs:
        check_graph(graph)
    bits_bytes(z.device)  # finds a setting that is no number
    _check_negative_mask(options.negative_mask, z)
    drawn = options.negative_mask is None and 0.0 < rate < 1.0
    seed = as_seed(options.seed, z.device) if drawn else None
    return Batch(streams, graphs, tokens, seed, chosen, options)


def graphs_of(
    features: Tensor,
    pool: Tensor | None,
    head_features: Tensor | None,
    head_pool: Tensor | None,
    positives_per_anchor: int | None,
) -> list[Graph]:
    """What P is found from, and Q: head_features need a head_pool exactly when the features have a pool."""
    positives_per_anchor = plain(positives_per_anchor)
    graphs = [Graph("features", features, "pool", pool, positives_per_anchor)]
    if head_features is not None:
        if (pool is None) != (head_pool is None):
            expected = "None, as pool is None" if pool is None else "a pool for head_features, as pool is given"
            raise ValueError(f"head_pool: expected {expected}, got {describe(head_pool)}")
        graphs.append(Graph("head_features", head_features, "head_pool", head_pool, positives_per_anchor))
    elif head_pool is not None:
        raise ValueError(f"head_pool: expected only together with head_features, got {describe(head_pool)}")
    return graphs


def tokens_of(z: Tensor, tokens_per_image: int | None) -> int:
    check_float_tensor("z", z, ndim=(2, 3))
    count = z.shape[0] if z.ndim == 2 else z.shape[0] * z.shape[1]
    if tokens_per_image is None:
        return max(1, z.shape[1] if z.ndim == 3 else count)
    tokens_per_image = check_int("tokens_per_image", tokens_per_image)
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
        raise TypeError(f"negative_mask: expected a bool tensor, got {describe(mask)}{as_bools(mask)}")
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


def is_zero(weight: float | Tensor) -> bool:
    """Whether a weight is the number 0; never of a tensor, nor in what torch.compile makes, where numbers vary."""
    return not torch.compiler.is_compiling() and not isinstance(weight, Tensor) and weight == 0


def check_loss_options(temperature: float, base_temperature: float, weighting: str) -> None:
    check_positive("temperature", temperature)
    check_positive("base_temperature", base_temperature)
    check_choice("weighting", weighting, WEIGHTINGS)
