"""The hidden-positive loss as plain composition: mine, normalise, three statistics a row, one weighted average.

Notation of the paper and of the op READMEs: P positives, Q head positives, E the denominator set,
l_ij = <x_i, x_j>/tau.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from hpkernels.common.checks import check_flag, describe, plain, poison, witness
from hpkernels.common.ranks import ALONE, Ranks, meet
from hpkernels.losses.arguments import Batch, Options, check_batch, graphs_of, witnesses_of
from hpkernels.losses.panels import Anchors, panel_rows, panel_statistics
from hpkernels.losses.routes import form_of_masks, form_of_rate
from hpkernels.losses.statistics import (
    Denominator,
    LossStats,
    average,
    loss_stats,
    statistics_of_all,
    unit_rows,
)
from hpkernels.mining import find_rule
from hpkernels.ops.pair_average.rows import Rows
from hpkernels.ops.pair_bits import op as pair_bits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    class _Keywords(TypedDict, total=False):
        """The keyword arguments that do not decide what comes back."""

        z_local: Tensor | None
        head_features: Tensor | None
        head_pool: Tensor | None
        head_weight: float | Tensor
        positives_per_anchor: int | None
        tokens_per_image: int | None
        temperature: float
        base_temperature: float
        negative_rate: float
        negative_mask: Tensor | None
        weighting: str
        head_in_denominator: bool
        seed: int | Tensor | None
        process_group: ProcessGroup | None
        backend: str | None


@overload
def hidden_positive_loss(
    z: Tensor, features: Tensor, pool: Tensor | None = None, *, return_stats: Literal[False] = False,
    **options: Unpack[_Keywords],
) -> Tensor: ...  # fmt: skip
@overload
def hidden_positive_loss(
    z: Tensor, features: Tensor, pool: Tensor | None = None, *, return_stats: Literal[True],
    **options: Unpack[_Keywords],
) -> tuple[Tensor, LossStats]: ...  # fmt: skip
@overload
def hidden_positive_loss(
    z: Tensor, features: Tensor, pool: Tensor | None = None, *, return_stats: bool, **options: Unpack[_Keywords]
) -> Tensor | tuple[Tensor, LossStats]: ...  # fmt: skip
def hidden_positive_loss(
    z: Tensor,
    features: Tensor,
    pool: Tensor | None = None,
    *,
    z_local: Tensor | None = None,
    head_features: Tensor | None = None,
    head_pool: Tensor | None = None,
    head_weight: float | Tensor = 0.0,
    positives_per_anchor: int | None = None,
    tokens_per_image: int | None = None,
    temperature: float = 0.8,
    base_temperature: float = 0.07,
    negative_rate: float = 0.02,
    negative_mask: Tensor | None = None,
    weighting: str = "pairs",
    head_in_denominator: bool = False,
    seed: int | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """Contrastive loss over all pairs of patches with hidden positives (Seong et al., CVPR 2023), in linear memory.

    Patches i, j are positives (P) when their backbone features are more alike than one of them is to a pool of
    reference patches; head positives (Q) follow the same rule on the momentum head's features. Anchors are pulled to
    their positives against a denominator E of positives and randomly drawn patches:

        W_ij = kappa_i (P_ij + lambda Q_ij),  n_i = sum_j W_ij,  kappa_i = [row i has a P positive]
        L = tau / (tau_b S B) sum_streams sum_images (1/Z_b) sum_{i in b} [n_i LSE_{j in E}(l_ij) - sum_j W_ij l_ij]

    with Z_b the sum of n_i over image b. The value is scaled by temperature / base_temperature (11.4 at the defaults),
    as published. Inputs are normalised inside, in fp32; gradients flow to z and z_local only.

    Args:
        z: (N, D) or (B, T, D), projected codes of all patches; rows of one image are consecutive. Any floating dtype.
        features: (N, C) or (B, T, C), backbone features of the same patches.
        pool: (M, C) reference patches. Exactly one of pool and positives_per_anchor.
        z_local: like z, the locally mixed stream; the loss is the mean over both streams.
        head_features: (N, H) or (B, T, H), momentum-head features for Q; head_pool (M', H) goes with pool.
        head_weight: lambda, a float or 0-dim tensor; may change every step. At 0.0 (the number, outside of
            torch.compile) Q is not searched for, unless head_in_denominator.
        positives_per_anchor: k; P_ij = j among the k nearest of i, or i among the k nearest of j.
        tokens_per_image: T, divides N; taken from z if it is (B, T, D), else N (one group).
        temperature, base_temperature: tau and tau_b, > 0.
        negative_rate: probability in [0, 1] that a column is in a token position's denominator, drawn once per call
            from a counter-based generator and shared by all images; 1 means all.
        negative_mask: bool (T, N) shared by all images, or (N, N); replaces the random draw. As fast as a draw of its
            density on a CPU; on a GPU, where counting would wait, and in torch.compile all pairs are swept.
        weighting: "pairs" (published: every positive pair counts the same), "anchors" (every kept row counts the
            same), "separate" (loss version 2: P over rows with P plus lambda times Q over rows with Q).
        head_in_denominator: E holds the head positives too, so that no pair's probability exceeds 1. Published: not.
        seed: int or 0-dim int64 tensor for the draw; None takes one from torch's default generator of z's device.
        process_group: a torch.distributed.ProcessGroup; see below. None: one process.
        return_stats: also return LossStats.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        0-dim fp32 loss (fp64 if z is fp64), or (loss, LossStats). Without any positive pair: 0 with zero gradients.

    **Many processes.** With a process_group every rank passes its own images, any number of them (none, too), and its
    part of the pools (at least one row), and the anchors of all ranks meet the patches of all ranks: the loss and
    LossStats are those of one process on the concatenated batch, the same on every rank, and z.grad is this rank's
    slice of that one loss's gradient (head_weight.grad: its share). Pass tokens_per_image or z as (B, T, D);
    negative_mask is over all N patches, the same on every rank, as is a head_weight that is a tensor; rank 0's seed
    serves all. Every rank calls backward, once. DistributedDataParallel averages the gradients of parameters over
    ranks, where this loss needs their sum:

        (loss * torch.distributed.get_world_size(process_group)).backward()

    A rank holds the unit rows of all ranks and the pairs of its own anchors, bits of n x N. Ranks first exchange shapes
    and options (which synchronises), so that an error on one of them is raised on all.

    **Memory.** The bits of P and Q take N^2 / 8 bytes each. Beyond 2 GiB on a CPU and 8 GiB on a GPU (environment
    variable HPKERNELS_BITS_BYTES) they are made for one panel of anchors at a time, in the forward and again in the
    backward pass: slower, the same loss and gradient to rounding.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected; non-finite input on the CPU. On a GPU
        non-finite input makes the loss NaN (HPKERNELS_CHECK=1 raises instead).
    """

    head_weight = plain(head_weight)
    options = Options(
        tokens_per_image, plain(temperature), plain(base_temperature), weighting,
        plain(negative_rate), negative_mask, seed, head_weight, head_in_denominator, backend,
    )  # fmt: skip

    def check() -> Batch:
        check_flag("return_stats", return_stats)
        graphs = graphs_of(features, pool, head_features, head_pool, positives_per_anchor)
        return check_batch(z, z_local, graphs, options, shared=process_group is not None)

    batch, ranks = (check(), ALONE) if process_group is None else meet(process_group, check, Batch.describe)
    total = ranks.total("z", batch.streams[0])
    statistics, witnesses = _statistics(batch, ranks, total)
    scale = float(options.temperature) / float(options.base_temperature)
    loss = average(statistics, head_weight, batch.tokens, total, weighting, scale, batch.backend)
    if not z.is_cpu:
        loss = loss + poison(*witnesses)
    if process_group is None:
        return (loss, loss_stats(statistics, total)) if return_stats else loss
    # The others' return_stats is not known here, so the numbers are always exchanged.
    loss, *shares = ranks.sum(torch.stack([loss, *loss_stats(statistics, total)])).unbind()
    return (loss, LossStats(*shares)) if return_stats else loss


def _statistics(batch: Batch, ranks: Ranks, total: int) -> tuple[Rows, list[Tensor]]:
    """The statistics of this rank's anchors, all bits at once or in panels, and the witnesses of bad numbers."""
    temperature, backend, count = float(batch.options.temperature), batch.backend, len(batch.streams[0])
    graphs = batch.searched()
    witnesses = witnesses_of(batch.graphs[len(graphs) :])
    rows_at_a_time = panel_rows(count, total, len(graphs), batch.streams[0].device)
    denominator = _denominator(batch, total, rows_at_a_time, ranks)
    if ranks is ALONE and rows_at_a_time == count:
        pairs = []
        for graph in graphs:
            rule = find_rule(graph, backend)
            pairs.append(rule.mask())
            witnesses.append(rule.witness)
        del rule  # and with it the unit rows of the features
        x = unit_rows(batch.streams, backend)
        found = statistics_of_all(x, pairs, denominator, temperature, backend)
    else:
        rules = [find_rule(graph, backend, ranks) for graph in graphs]
        witnesses += [rule.witness for rule in rules]
        x = unit_rows(batch.streams, backend)
        anchors = Anchors(rules, rows_at_a_time, denominator, temperature, backend, ranks, count)
        found = panel_statistics(x, anchors)
    return found, [*witnesses, *map(witness, x)]


def _denominator(batch: Batch, total: int, rows_at_a_time: int, ranks: Ranks) -> Denominator:
    """E from the random columns or those given, and the cheapest way to evaluate it."""
    mask, rate, tokens = batch.options.negative_mask, float(batch.options.negative_rate), batch.tokens
    with_head = batch.options.head_in_denominator
    if mask is not None:
        if tuple(mask.shape) not in ((tokens, total), (total, total)):
            expected = f"expected shape {(tokens, total)} or {(total, total)}"
            raise ValueError(f"negative_mask: {expected}, got {describe(mask)}")
        given = pair_bits.pack_bits(mask)
        return Denominator(given, form_of_masks(given, total, rows_at_a_time, batch.backend), with_head)
    if rate == 1.0:
        return Denominator(None, "all", with_head)
    if batch.seed is None:  # rate 0
        return Denominator(None, "sparse", with_head)
    drawn = pair_bits.random_bits(ranks.of_first(batch.seed), tokens, total, rate, batch.backend)
    return Denominator(drawn, form_of_rate(rate, rows_at_a_time // tokens, drawn.device), with_head)
