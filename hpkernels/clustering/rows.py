"""Rows for clustering: one tensor or batches that can be iterated again, checked, and read in passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import check_flag, check_float_tensor, describe, look_finite
from hpkernels.common.sums import sum_last
from hpkernels.ops.normalize.op import normalize_rows

_ROWS = 1 << 16  # of a tensor at a time


class Rows:
    """The rows to cluster, batch by batch, checked as they come."""

    def __init__(self, x: Tensor | Iterable[Tensor], spherical: bool, backend: str | None) -> None:
        if isinstance(x, Iterator) or not isinstance(x, (Tensor, Iterable)):
            raise TypeError(f"x: expected a tensor or batches that can be iterated again, got {type(x).__name__}")
        check_flag("spherical", spherical)
        self.x, self.spherical = x, spherical
        self.count, self.dtype = 0, torch.float32
        first = None
        for batch in self.given():
            first = batch if first is None else first
            if batch.shape[1] != first.shape[1] or batch.device != first.device:
                expected = f"expected batches of {first.shape[1]} columns on {first.device}"
                raise ValueError(f"x: {expected}, got {describe(batch)}")
            if batch.is_meta:
                raise ValueError(f"x: expected rows with numbers, got {describe(batch)}")
            self.count += batch.shape[0]
            self.dtype = torch.promote_types(self.dtype, batch.dtype)
        if first is None:
            raise ValueError("x: expected at least one batch, got none")
        self.width, self.device = first.shape[1], first.device
        self.backend = dispatch.choose(self.device, backend, torch.empty(0, dtype=self.dtype))
        if isinstance(x, Tensor) and spherical:  # once, where one copy of the rows fits as they do
            self.x = normalize_rows(x.detach(), "x", self.backend)

    def given(self) -> Iterator[Tensor]:
        """The batches as they were given; a tensor in pieces, as something may be made of every row of a piece."""
        if isinstance(self.x, Tensor):
            check_float_tensor("x", self.x)
            yield from self.x.detach().split(_ROWS)
            return
        for batch in self.x:
            check_float_tensor("x", batch)
            yield batch.detach()

    def __iter__(self) -> Iterator[Tensor]:
        """Batches as the assignment takes them: unit rows if spherical, fp64 if one batch is."""
        for batch in self.given():
            if self.dtype == torch.float64:
                batch = batch.double()
            unit = self.spherical and not isinstance(self.x, Tensor)
            yield normalize_rows(batch, "x", self.backend) if unit else batch

    def pick(self, indices: Tensor) -> Tensor:
        """Rows by their numbers among all rows, in that order, in the working dtype."""
        picked = torch.empty(len(indices), self.width, dtype=self.dtype, device=self.device)
        first = 0
        for batch in self:
            inside = ((indices >= first) & (indices < first + len(batch))).nonzero()[:, 0]
            if len(inside):
                picked[inside.to(self.device)] = batch[(indices[inside] - first).to(self.device)].to(self.dtype)
            first += len(batch)
        return picked

    def mean_variance(self) -> float:
        """The variance of a column, averaged over columns; in fp64 around the first row."""
        total, squares = torch.zeros(2, self.width, dtype=torch.float64, device=self.device)
        shift = None
        for batch in self:
            batch = batch.double()
            shift = batch[:1] if shift is None else shift
            total = total + sum_last((batch - shift).T)
            squares = squares + sum_last((batch - shift).T.square())
        return float((squares / self.count - (total / self.count).square()).clamp_min(0).mean())


def look_centroids(name: str, centroids: Tensor, spherical: bool) -> None:
    """ValueError, on the CPU, for centroids so large that squared distances from them are no numbers."""
    width = max(1, centroids.shape[-1])
    look_finite(name, centroids, float("inf") if spherical else (torch.finfo(centroids.dtype).max / width) ** 0.5 / 2)


def scores(centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """(directions, bias) with argmax_k <x, directions_k> + bias_k the nearest centroid.

    Euclidean: |x - mu_k|^2 = |x|^2 - 2 (<x, mu_k> - |mu_k|^2 / 2), less what all k share: with the mean c of the
    centroids, <x, mu_k - c> - <mu_k - c, mu_k + c> / 2 rounds by the offset of the rows from zero times their spread,
    not by its square.
    """
    if spherical:
        return centroids, centroids.new_zeros(centroids.shape[0])
    exact = centroids.double()
    mean = exact.mean(0)
    bias = -((exact - mean) * (exact + mean)).sum(1) / 2
    return (exact - mean).to(centroids.dtype), bias.to(centroids.dtype)
