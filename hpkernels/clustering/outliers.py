"""How far is too far from a centroid: quantiles of distances from histograms (`outlier_distances`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hpkernels.clustering.kmeans import assign_clusters
from hpkernels.clustering.rows import Rows
from hpkernels.common.checks import check_choice, check_flag, check_float_tensor, plain

SCOPES = ("cluster", "all")
_BINS = 4096
_COARSE_SHIFT, _FINE_SHIFT = 19, 7  # of the 31 bits of a number >= 0: the first 12, and the next 12


def outlier_distances(
    x: Tensor | Iterable[Tensor],
    centroids: Tensor,
    *,
    fraction: float = 0.05,
    scope: str = "cluster",
    spherical: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Squared distances (K,) beyond which a row counts as an outlier, from histograms: no distance is stored.

    A row is an outlier if `assign_clusters(..).distances > thresholds[labels]`: at most the given fraction of the rows
    of its cluster (scope "cluster") or of all rows ("all": K times one threshold), fewer only by rows within a relative
    1.6e-5 of the threshold. Two passes over x (a tensor, or batches as in `kmeans`, which one more
    pass checks) with 4,096 bins a cluster: the
    floats >= 0 have the order of their bits, so the first pass counts by the first twelve bits, which finds the
    sixteenth of a power of two that holds the quantile, and the second by the next twelve.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected.
    """
    fraction = plain(fraction)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected a number in [0, 1), got {fraction!r}")
    check_choice("scope", scope, SCOPES)
    check_float_tensor("centroids", centroids)
    rows = Rows(x, False, backend)
    check_flag("spherical", spherical)
    groups = centroids.shape[0] if scope == "cluster" else 1

    def histogram(bin_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Counts (groups, bins); a row whose bin is -1 is not counted."""
        table = torch.zeros(groups * _BINS, dtype=torch.int64, device=rows.device)
        for batch in rows:
            found = assign_clusters(batch, centroids, spherical=spherical, backend=backend)
            group = found.labels if scope == "cluster" else torch.zeros_like(found.labels)
            bins = bin_of(found.distances.float().view(torch.int32).long(), group)
            table.scatter_add_(0, group * _BINS + bins.clamp_min(0), (bins >= 0).long())
        return table.view(groups, _BINS)

    coarse = histogram(lambda bits, group: bits >> _COARSE_SHIFT)
    total = coarse.sum(1)
    within = total - (fraction * total).long()  # so many rows are no outliers
    holding, before = _bin_of_rank(coarse, within)

    def fine_bin(bits: Tensor, group: Tensor) -> Tensor:
        return torch.where(bits >> _COARSE_SHIFT == holding[group], bits >> _FINE_SHIFT & _BINS - 1, -1)

    last, _ = _bin_of_rank(histogram(fine_bin), within - before)
    upper = (holding << _COARSE_SHIFT) + (last + 1 << _FINE_SHIFT)
    thresholds = torch.where(total > 0, upper, 0).int().view(torch.float32)
    return thresholds.expand(centroids.shape[0]).clone()


def _bin_of_rank(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each group that holds its rank-th number, and how many lie in the bins before it."""
    cumulative = counts.cumsum(1)
    holding = (cumulative >= rank[:, None]).int().argmax(1)
    return holding, (cumulative - counts).gather(1, holding[:, None])[:, 0]
