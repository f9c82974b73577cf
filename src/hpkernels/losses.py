"""The losses, as plain composition: normalise, mine, three statistics a row, one weighted average.

Notation of the paper and of the op READMEs: P positives, Q head positives, E the denominator set, l_ij = <x_i, x_j>/tau.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels._bits import pack
from hpkernels._checks import check_choice, check_float_tensor, check_positive, check_rate, describe
from hpkernels.mining import mine
from hpkernels.ops.contrastive.op import contrastive_stats
from hpkernels.ops.normalize.op import normalize_rows
from hpkernels.ops.pair_bits import op as pair_bits
from hpkernels.pairs import PairMask, as_seed

WEIGHTINGS = ("pairs", "anchors", "separate")

# Up to this rate, for each image that shares a row of random columns and at most the second figure, the columns are
# gathered instead of swept. Measured break-even on a CPU: 0.06 for one image, 0.3 for eight (op README).
SPARSE_RATE_PER_IMAGE, SPARSE_RATE_LIMIT = 0.06, 0.25


class LossStats(NamedTuple):
    """0-dim tensors on the loss's device; reading one synchronises, computing them does not."""

    positives_per_anchor: Tensor  # mean number of P pairs of a row
    kept_fraction: Tensor  # share of rows that have a P pair
    mean_lse: Tensor  # mean of LSE_i over rows and streams


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
    seed: int | Tensor | None = None,
    process_group=None,
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
        seed: int or 0-dim int64 tensor for the draw; None takes one from torch's default generator of z's device.
        process_group: not available in this version; must be None.
        return_stats: also return LossStats.
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        0-dim fp32 loss (fp64 if z is fp64), or (loss, LossStats). Without any positive pair: 0 with zero gradients.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected; non-finite input on the CPU. On a GPU
        non-finite input makes the loss NaN (HPKERNELS_CHECK=1 raises instead).
    """
    if process_group is not None:
        raise ValueError(f"process_group: expected None (one process) in this version, got {process_group!r}")
    tokens = _tokens_per_image(z, tokens_per_image)
    streams = _streams(z, z_local)
    count = streams[0].shape[0]
    features = _rows("features", features, count, z)
    chosen = dispatch.choose(z.device, backend, *streams, features, pool, head_features, head_pool)
    rate = check_rate("negative_rate", negative_rate)
    _check_loss_options(temperature, base_temperature, weighting)

    head_features = _check_head(head_features, head_pool, head_weight, pool, count, z)
    positives = mine("features", features, "pool", pool, positives_per_anchor, chosen)
    extra = None
    if head_features is not None:
        extra = mine("head_features", head_features, "head_pool", head_pool, positives_per_anchor, chosen)

    if negative_mask is not None:
        negatives, denominator = _explicit_negatives(negative_mask, tokens, count), "dense"
    elif rate == 1.0:
        negatives, denominator = None, "all"
    elif rate == 0.0:
        negatives, denominator = None, "sparse"
    else:
        negatives = pair_bits.random_bits(as_seed(seed, z.device), tokens, count, rate, chosen)
        images = count // tokens
        denominator = "sparse" if rate <= min(SPARSE_RATE_LIMIT, SPARSE_RATE_PER_IMAGE * images) else "dense"

    x = [normalize_rows(s, name, chosen)[None] for s, name in zip(streams, ("z", "z_local"))]
    loss, stats = _masked_loss(
        x, positives, extra, head_weight, negatives, denominator, tokens, temperature, base_temperature, weighting, chosen
    )
    if not z.is_cpu:
        loss = loss + _poison(*streams, features, pool, head_features, head_pool)
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
    backend: str | None = None,
) -> Tensor:
    """`hidden_positive_loss` on pairs of your own: positives and denominator are given as PairMasks.

    Args:
        z: (N, D) or (B, T, D), any floating dtype, normalised inside. The gradient flows to it.
        positives: PairMask (N, N), P; its diagonal is ignored. It always enters the denominator.
        extra_positives: PairMask (N, N), Q, weighted by extra_weight (float or 0-dim tensor); not in the denominator.
        negatives: PairMask (R, N), R divides N; row i's denominator holds P and the columns of row i mod R.
            None: every other row (as in SupCon, Khosla et al. 2020).
        tokens_per_image, temperature, base_temperature, weighting, backend: as in `hidden_positive_loss`.

    Returns:
        0-dim fp32 loss (fp64 if z is fp64), scaled by temperature / base_temperature.
    """
    tokens = _tokens_per_image(z, tokens_per_image)
    (rows,) = _streams(z, None)
    count = rows.shape[0]
    _check_loss_options(temperature, base_temperature, weighting)
    _check_pairs("positives", positives, (count, count), z)
    if extra_positives is not None:
        _check_pairs("extra_positives", extra_positives, (count, count), z)
    _check_weight("extra_weight", extra_weight, "extra_positives", extra_positives)
    if negatives is not None:
        _check_pairs("negatives", negatives, (None, count), z)
        if count and (negatives.shape[0] == 0 or count % negatives.shape[0]):
            raise ValueError(f"negatives: expected a number of rows that divides N = {count}, got {negatives!r}")
    positives = positives.off_diagonal()
    extra_positives = None if extra_positives is None else extra_positives.off_diagonal()
    chosen = dispatch.choose(z.device, backend, z)
    x = [normalize_rows(rows, "z", chosen)[None]]
    bits, denominator = (None, "all") if negatives is None else (negatives.bits, "dense")
    loss, _ = _masked_loss(
        x, positives, extra_positives, extra_weight, bits, denominator, tokens, temperature, base_temperature, weighting,
        chosen,
    )  # fmt: skip
    return loss if z.is_cpu else loss + _poison(rows)


def _masked_loss(
    x: list[Tensor],
    positives: PairMask,
    extra: PairMask | None,
    extra_weight: float | Tensor,
    negatives: Tensor | None,
    denominator: str,
    tokens: int,
    temperature: float,
    base_temperature: float,
    weighting: str,
    backend: str,
) -> tuple[Tensor, LossStats]:
    """The loss of unit rows, one x (1, N, D) a stream: statistics from the kernels, then averages over the (S, N) tables."""
    masks = (
        positives.bits, _transpose(positives, backend), None if extra is None else extra.bits,
        _transpose(extra, backend), negatives,
    )  # fmt: skip
    # On a GPU all streams share launches and column lists. On a CPU one call a stream: the backward pass then holds the
    # gradient of one stream at a time beside the unit rows.
    calls = x if x[0].is_cpu else [torch.cat(x)]
    tables = [contrastive_stats(streams, *masks, denominator, float(temperature), backend) for streams in calls]
    lse, pos, ext = (torch.cat(table) for table in zip(*tables))
    n_pos = pair_bits.count_bits(positives.bits, backend).to(lse.dtype)
    n_ext = pair_bits.count_bits(extra.bits, backend).to(lse.dtype) if extra is not None else torch.zeros_like(n_pos)
    kept = (n_pos > 0).to(lse.dtype)
    streams, count = lse.shape
    images = max(1, count // tokens)

    def per_image(rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:-1], images, -1).sum(-1)

    def average(numerator: Tensor, weight: Tensor) -> Tensor:
        """Mean over streams and images of sum(numerator) / sum(weight); an image without weight adds 0."""
        total = per_image(weight)
        inverse = torch.where(total == 0, 0.0, 1.0 / torch.where(total == 0, 1.0, total))
        return (per_image(numerator) * inverse).sum() / (streams * images)

    if weighting == "separate":
        loss = average(n_pos * lse - pos, n_pos) + extra_weight * average(n_ext * lse - ext, n_ext)
    else:
        weight = kept * (n_pos + extra_weight * n_ext)
        rows = weight * lse - kept * (pos + extra_weight * ext)
        if weighting == "anchors":
            rows, weight = rows / torch.where(weight == 0, 1.0, weight), kept
        loss = average(rows, weight)
    loss = (loss * (temperature / base_temperature)).to(lse.dtype)
    rows = max(1, count)
    with torch.no_grad():
        stats = LossStats(n_pos.sum() / rows, kept.sum() / rows, lse.sum() / (rows * streams))
    return loss, stats


def _transpose(mask: PairMask | None, backend: str) -> Tensor | None:
    if mask is None or mask.symmetric:
        return None
    return pair_bits.transpose_bits(mask.bits, mask.columns, backend)


def _poison(*tensors: Tensor | None) -> Tensor:
    """0, or NaN when an input holds NaN or infinity, which comparisons and unused rows would hide. No synchronisation."""
    return sum((t.detach() * 0.0).sum().float() for t in tensors if t is not None)


def _tokens_per_image(z: Tensor, tokens_per_image: int | None) -> int:
    check_float_tensor("z", z, ndim=(2, 3))
    count = z.shape[0] if z.ndim == 2 else z.shape[0] * z.shape[1]
    if tokens_per_image is None:
        return max(1, z.shape[1] if z.ndim == 3 else count)
    if not isinstance(tokens_per_image, int) or isinstance(tokens_per_image, bool):
        raise TypeError(f"tokens_per_image: expected an int, got {tokens_per_image!r}")
    if z.ndim == 3 and tokens_per_image != z.shape[1]:
        raise ValueError(f"tokens_per_image: expected {z.shape[1]} as in z {tuple(z.shape)}, got {tokens_per_image}")
    if tokens_per_image < 1 or count % tokens_per_image:
        raise ValueError(f"tokens_per_image: expected a positive divisor of N = {count}, got {tokens_per_image}")
    return tokens_per_image


def _streams(z: Tensor, z_local: Tensor | None) -> list[Tensor]:
    """z and z_local as (N, D) rows."""
    streams = [z]
    if z_local is not None:
        check_float_tensor("z_local", z_local, ndim=(2, 3), like=z)
        if z_local.shape != z.shape:
            raise ValueError(f"z_local: expected the shape of z {tuple(z.shape)}, got {describe(z_local)}")
        streams.append(z_local)
    return [s.flatten(0, 1) if s.ndim == 3 else s for s in streams]


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
    _check_weight("head_weight", head_weight, "head_features", head_features)
    if head_features is None:
        if head_pool is not None:
            raise ValueError(f"head_pool: expected only together with head_features, got {describe(head_pool)}")
        return None
    if (pool is None) != (head_pool is None):
        expected = "None, as pool is None" if pool is None else "a pool for head_features, as pool is given"
        raise ValueError(f"head_pool: expected {expected}, got {describe(head_pool)}")
    return _rows("head_features", head_features, count, z)


def _check_weight(name: str, weight: float | Tensor, pairs_name: str, pairs: object) -> None:
    if isinstance(weight, Tensor):
        if weight.ndim != 0:
            raise ValueError(f"{name}: expected a float or a 0-dim tensor, got {describe(weight)}")
        if pairs is None:
            raise ValueError(f"{name}: expected 0.0 without {pairs_name}, got {describe(weight)}")
        return
    if isinstance(weight, bool) or not isinstance(weight, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a float or a 0-dim tensor, got {weight!r}")
    if pairs is None and weight != 0:
        raise ValueError(f"{name}: expected 0.0 without {pairs_name}, got {weight}")
    if not torch.compiler.is_compiling() and not 0.0 <= weight < float("inf"):
        raise ValueError(f"{name}: expected a finite number >= 0, got {weight}")


def _check_loss_options(temperature: float, base_temperature: float, weighting: str) -> None:
    check_positive("temperature", temperature)
    check_positive("base_temperature", base_temperature)
    check_choice("weighting", weighting, WEIGHTINGS)


def _explicit_negatives(mask: Tensor, tokens: int, count: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"negative_mask: expected a bool tensor, got {describe(mask)}")
    if tuple(mask.shape) not in ((tokens, count), (count, count)):
        raise ValueError(f"negative_mask: expected shape {(tokens, count)} or {(count, count)}, got {describe(mask)}")
    return pack(mask)


def _check_pairs(name: str, pairs: object, shape: tuple[int | None, int], z: Tensor) -> None:
    if not isinstance(pairs, PairMask):
        raise TypeError(f"{name}: expected a PairMask, got {type(pairs).__name__}")
    if pairs.shape[1] != shape[1] or shape[0] not in (None, pairs.shape[0]) or pairs.device != z.device:
        rows = "R" if shape[0] is None else shape[0]
        raise ValueError(f"{name}: expected a PairMask of shape ({rows}, {shape[1]}) on {z.device}, got {pairs!r}")
