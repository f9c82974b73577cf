"""The loss on pairs of the caller's own: `masked_contrastive_loss`."""

from __future__ import annotations

from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import check_flag, plain, poison, witness
from hpkernels.losses.arguments import check_loss_options, check_weight, is_zero, streams_of, tokens_of
from hpkernels.losses.routes import form_of_masks
from hpkernels.losses.statistics import Denominator, average, statistics_of_all, unit_rows
from hpkernels.pairs import PairMask


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
            None: every other row (as in SupCon, Khosla et al. 2020). On a CPU the density of all pairs decides how
            they are walked; on a GPU, where counting would wait, and in torch.compile all pairs are swept.
        tokens_per_image, temperature, base_temperature, weighting, backend: as in `hidden_positive_loss`.

    Returns:
        0-dim fp32 loss (fp64 if z is fp64), scaled by temperature / base_temperature.
    """
    extra_weight, temperature, base_temperature = map(plain, (extra_weight, temperature, base_temperature))
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
    if is_zero(extra_weight) and not extra_in_denominator:
        extra_positives = None  # checked, and without any effect
    masks = [mask.off_diagonal() for mask in (positives, extra_positives) if mask is not None]
    chosen = dispatch.choose(z.device, backend, z)
    denominator = Denominator(None, "all", extra_in_denominator)
    if negatives is not None:
        form = form_of_masks(negatives.bits, count, count, chosen, *(mask.bits for mask in masks))
        denominator = denominator._replace(negatives=negatives.bits, form=form)
    x = unit_rows([rows], chosen)
    statistics = statistics_of_all(x, masks, denominator, float(temperature), chosen)
    loss = average(statistics, extra_weight, tokens, count, weighting, temperature / base_temperature, chosen)
    return loss if z.is_cpu else loss + poison(witness(x[0]))


def _check_pairs(name: str, pairs: object, shape: tuple[int | None, int], z: Tensor) -> None:
    if not isinstance(pairs, PairMask):
        raise TypeError(f"{name}: expected a PairMask, got {type(pairs).__name__}")
    if pairs.shape[1] != shape[1] or shape[0] not in (None, pairs.shape[0]) or pairs.device != z.device:
        rows = "R" if shape[0] is None else shape[0]
        raise ValueError(f"{name}: expected a PairMask of shape ({rows}, {shape[1]}) on {z.device}, got {pairs!r}")
