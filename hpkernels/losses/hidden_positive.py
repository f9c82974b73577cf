"""The losses, as plain composition: normalise, mine, three statistics a row, one weighted average.

Notation of the paper and of the op READMEs: P positives, Q head positives, E the denominator set,
l_ij = <x_i, x_j>/tau.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.bits import pack
from hpkernels.common.checks import check_flag, describe, poison
from hpkernels.common.ranks import ALONE, Ranks, meet
from hpkernels.common.sums import sum_all, sum_last
from hpkernels.losses.arguments import Batch, check_batch, check_loss_options, check_weight, streams_of, tokens_of
from hpkernels.losses.panels import Denominator, Statistics, panel_rows, panel_statistics, tables
from hpkernels.mining import find_rule
from hpkernels.ops.contrastive.op import contrastive_stats
from hpkernels.ops.normalize.op import normalize_rows
from hpkernels.ops.pair_bits import op as pair_bits
from hpkernels.pairs import PairMask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Up to this rate, for each image that shares a row of random columns and at most the second figure, the columns are
# gathered instead of swept. Measured break-even on a CPU: 0.06 for one image, 0.3 for eight (op README). On a GPU,
# where it was not measured, the limit is what the column lists have room for, with a margin
# (ops/contrastive/triton/lists.py: 5 / 32).
SPARSE_RATE_PER_IMAGE, SPARSE_RATE_LIMIT = 0.06, {"cpu": 0.25, "cuda": 0.125}


class LossStats(NamedTuple):
    """0-dim tensors on the loss's device; reading one synchronises, computing them does not."""

    positives_per_anchor: Tensor  # mean number of P pairs of a row
    kept_fraction: Tensor  # share of rows that have a P pair
    mean_lse: Tensor  # mean of LSE_i over rows and streams


@overload
def hidden_positive_loss(
    z: Tensor, features: Tensor, pool: Tensor | None = None, *, z_local: Tensor | None = None,
    head_features: Tensor | None = None, head_pool: Tensor | None = None, head_weight: float | Tensor = 0.0,
    positives_per_anchor: int | None = None, tokens_per_image: int | None = None, temperature: float = 0.8,
    base_temperature: float = 0.07, negative_rate: float = 0.02, negative_mask: Tensor | None = None,
    weighting: str = "pairs", head_in_denominator: bool = False, seed: int | Tensor | None = None,
    process_group: ProcessGroup | None = None, return_stats: Literal[False] = False, backend: str | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def hidden_positive_loss(
    z: Tensor, features: Tensor, pool: Tensor | None = None, *, z_local: Tensor | None = None,
    head_features: Tensor | None = None, head_pool: Tensor | None = None, head_weight: float | Tensor = 0.0,
    positives_per_anchor: int | None = None, tokens_per_image: int | None = None, temperature: float = 0.8,
    base_temperature: float = 0.07, negative_rate: float = 0.02, negative_mask: Tensor | None = None,
    weighting: str = "pairs", head_in_denominator: bool = False, seed: int | Tensor | None = None,
    process_group: ProcessGroup | None = None, return_stats: Literal[True], backend: str | None = None,
) -> tuple[Tensor, LossStats]: ...  # fmt: skip


@overload
def hidden_positive_loss(
    z: Tensor, features: Tensor, pool: Tensor | None = None, *, z_local: Tensor | None = None,
    head_features: Tensor | None = None, head_pool: Tensor | None = None, head_weight: float | Tensor = 0.0,
    positives_per_anchor: int | None = None, tokens_per_image: int | None = None, temperature: float = 0.8,
    base_temperature: float = 0.07, negative_rate: float = 0.02, negative_mask: Tensor | None = None,
    weighting: str = "pairs", head_in_denominator: bool = False, seed: int | Tensor | None = None,
    process_group: ProcessGroup | None = None, return_stats: bool, backend: str | None = None,
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
        head_weight: lambda, a float or 0-dim tensor; may change every step.
        positives_per_anchor: k; P_ij = j among the k nearest of i, or i among the k nearest of j.
        tokens_per_image: T, divides N; taken from z if it is (B, T, D), else N (one group).
        temperature, base_temperature: tau and tau_b, > 0.
        negative_rate: probability in [0, 1] that a column is in a token position's denominator, drawn once per call
            from a counter-based generator and shared by all images; 1 means all.
        negative_mask: bool (T, N) shared by all images, or (N, N); replaces the random draw.
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

    def check() -> Batch:
        return check_batch(
            z, features, pool, z_local, head_features, head_pool, head_weight, positives_per_anchor, tokens_per_image,
            temperature, base_temperature, negative_rate, negative_mask, weighting, head_in_denominator, seed,
            process_group, return_stats, backend,
        )  # fmt: skip

    batch, ranks = (check(), ALONE) if process_group is None else meet(process_group, check, Batch.describe)
    chosen, tokens, count = batch.backend, batch.tokens, batch.streams[0].shape[0]
    total = ranks.total("z", batch.streams[0])
    rows_at_a_time = panel_rows(count, total, len(batch.graphs), z.device)
    denominator = _denominator(batch, negative_mask, head_in_denominator, total, rows_at_a_time, ranks)
    temperature, base_temperature = float(temperature), float(base_temperature)

    if ranks is ALONE and rows_at_a_time == count:
        masks = [find_rule(*graph, positives_per_anchor, chosen).mask() for graph in batch.graphs]
        statistics = _statistics(_unit(batch.streams, chosen), masks, denominator, temperature, chosen)
    else:
        rules = [find_rule(*graph, positives_per_anchor, chosen, ranks) for graph in batch.graphs]
        x = _unit(batch.streams, chosen)
        statistics = panel_statistics(x, rules, rows_at_a_time, denominator, temperature, chosen, ranks)
    loss, stats = _average(statistics, head_weight, tokens, total, weighting)
    loss = loss * (temperature / base_temperature)
    if not z.is_cpu:
        loss = loss + poison(*batch.streams, *(x for graph in batch.graphs for x in graph[1::2]))
    if process_group is not None:
        loss, *shares = ranks.sum(torch.stack([loss, *stats])).unbind()
        stats = LossStats(*shares)
    return (loss, stats) if return_stats else loss


def masked_contrastive_loss(
    z: Tensor,
    positives: PairMask,
    *,
    extra_positives: PairMask | None = None,
    extra_weight: float | Tensor = 0.0,
    negatives: PairMask | None = None,
    tokens_per_image: int | None = None,
    temperature: float = 0.8,
    base_temperature: float = 0.07,
    weighting: str = "pairs",
    extra_in_denominator: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`hidden_positive_loss` on pairs of your own: positives and denominator are given as PairMasks.

    Args:
        z: (N, D) or (B, T, D), any floating dtype, normalised inside. The gradient flows to it.
        positives: PairMask (N, N), P; its diagonal is ignored. It always enters the denominator.
        extra_positives: PairMask (N, N), Q, weighted by extra_weight (float or 0-dim tensor); in the denominator
            only with extra_in_denominator.
        negatives: PairMask (R, N), R divides N; row i's denominator holds P and the columns of row i mod R.
            None: every other row (as in SupCon, Khosla et al. 2020).
        tokens_per_image, temperature, base_temperature, weighting, backend: as in `hidden_positive_loss`.

    Returns:
        0-dim fp32 loss (fp64 if z is fp64), scaled by temperature / base_temperature.
    """
    tokens = tokens_of(z, tokens_per_image)
    (rows,) = streams_of(z, None)
    count = rows.shape[0]
    check_loss_options(temperature, base_temperature, weighting)
    check_flag("extra_in_denominator", extra_in_denominator)
    _check_pairs("positives", positives, (count, count), z)
    if extra_positives is not None:
        _check_pairs("extra_positives", extra_positives, (count, count), z)
    check_weight("extra_weight", extra_weight, "extra_positives", extra_positives, z)
    if negatives is not None:
        _check_pairs("negatives", negatives, (None, count), z)
        if count and (negatives.shape[0] == 0 or count % negatives.shape[0]):
            raise ValueError(f"negatives: expected a number of rows that divides N = {count}, got {negatives!r}")
    masks = [mask.off_diagonal() for mask in (positives, extra_positives) if mask is not None]
    chosen = dispatch.choose(z.device, backend, z)
    bits, form = (None, "all") if negatives is None else (negatives.bits, "dense")
    denominator = Denominator(bits, form, extra_in_denominator)
    statistics = _statistics(_unit([rows], chosen), masks, denominator, float(temperature), chosen)
    loss, _ = _average(statistics, extra_weight, tokens, count, weighting)
    loss = loss * (temperature / base_temperature)
    return loss if z.is_cpu else loss + poison(rows)


def _denominator(
    batch: Batch, negative_mask: Tensor | None, with_head: bool, total: int, rows_at_a_time: int, ranks: Ranks
) -> Denominator:
    """E from the random columns or those given, and the cheapest way to evaluate it."""
    rate, tokens = batch.negative_rate, batch.tokens
    if negative_mask is not None:
        if tuple(negative_mask.shape) not in ((tokens, total), (total, total)):
            expected = f"expected shape {(tokens, total)} or {(total, total)}"
            raise ValueError(f"negative_mask: {expected}, got {describe(negative_mask)}")
        return Denominator(pack(negative_mask), "dense", with_head)
    if rate == 1.0:
        return Denominator(None, "all", with_head)
    if batch.seed is None:  # rate 0
        return Denominator(None, "sparse", with_head)
    negatives = pair_bits.random_bits(ranks.of_first(batch.seed), tokens, total, rate, batch.backend)
    limit = SPARSE_RATE_LIMIT.get(negatives.device.type, SPARSE_RATE_LIMIT["cpu"])
    images = rows_at_a_time // tokens
    form = "sparse" if rate <= min(limit, SPARSE_RATE_PER_IMAGE * images) else "dense"
    return Denominator(negatives, form, with_head)


def _unit(streams: list[Tensor], backend: str) -> list[Tensor]:
    """Unit rows, (S_c, n, D) for each call of the contrastive op.

    On a GPU all streams share launches and column lists. On a CPU one call a stream: the backward pass then holds the
    gradient of one stream at a time beside the unit rows.
    """
    x = [normalize_rows(rows, name, backend)[None] for rows, name in zip(streams, ("z", "z_local"))]
    return x if x[0].is_cpu else [torch.cat(x)]


def _statistics(
    x: list[Tensor], masks: list[PairMask], denominator: Denominator, temperature: float, backend: str
) -> Statistics:
    """The statistics of all rows at once; masks: P, or P and Q."""
    P, Q = masks[0], masks[1] if len(masks) > 1 else None
    bits = (P.bits, _transpose(P, backend), None if Q is None else Q.bits, _transpose(Q, backend))
    evaluate = partial(contrastive_stats, temperature=temperature, backend=backend)
    lse, pos, ext = tables(evaluate, x, denominator.calls(*bits))
    n_pos = pair_bits.count_bits(P.bits, backend).to(lse.dtype)
    n_ext = torch.zeros_like(n_pos) if Q is None else pair_bits.count_bits(Q.bits, backend).to(lse.dtype)
    return Statistics(lse, pos, ext, n_pos, n_ext)


def _average(
    statistics: Statistics, extra_weight: float | Tensor, tokens: int, total: int, weighting: str
) -> tuple[Tensor, LossStats]:
    """The loss before its scale, and LossStats, of the images at hand: as a share of what all `total` rows make."""
    lse, pos, ext, n_pos, n_ext = statistics
    kept = (n_pos > 0).to(lse.dtype)
    streams, count = lse.shape
    images, all_images = max(1, count // tokens), max(1, total // tokens)

    def per_image(rows: Tensor) -> Tensor:
        return sum_last(rows.reshape(*rows.shape[:-1], images, -1))

    def average(numerator: Tensor, weight: Tensor) -> Tensor:
        """Mean over streams and images of sum(numerator) / sum(weight); an image without weight adds 0."""
        weight = per_image(weight)
        inverse = torch.where(weight == 0, 0.0, 1.0 / torch.where(weight == 0, 1.0, weight))
        return sum_all(per_image(numerator) * inverse) / (streams * all_images)

    if weighting == "separate":
        loss = average(n_pos * lse - pos, n_pos) + extra_weight * average(n_ext * lse - ext, n_ext)
    else:
        weight = kept * (n_pos + extra_weight * n_ext)
        rows = weight * lse - kept * (pos + extra_weight * ext)
        if weighting == "anchors":
            rows, weight = rows / torch.where(weight == 0, 1.0, weight), kept
        loss = average(rows, weight)
    anchors = max(1, total)
    with torch.no_grad():
        stats = LossStats(sum_all(n_pos) / anchors, sum_all(kept) / anchors, sum_all(lse) / (anchors * streams))
    return loss.to(lse.dtype), stats


def _transpose(mask: PairMask | None, backend: str) -> Tensor | None:
    if mask is None or mask.symmetric:
        return None
    return pair_bits.transpose_bits(mask.bits, mask.columns, backend)


def _check_pairs(name: str, pairs: object, shape: tuple[int | None, int], z: Tensor) -> None:
    if not isinstance(pairs, PairMask):
        raise TypeError(f"{name}: expected a PairMask, got {type(pairs).__name__}")
    if pairs.shape[1] != shape[1] or shape[0] not in (None, pairs.shape[0]) or pairs.device != z.device:
        rows = "R" if shape[0] is None else shape[0]
        raise ValueError(f"{name}: expected a PairMask of shape ({rows}, {shape[1]}) on {z.device}, got {pairs!r}")
