"""Pair bits on `hpkernels._cuda`: counter-based random bits, counts, transposition, pairs from index lists."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import _cuda
from hpkernels.common.bits import words
from hpkernels.ops.common.cuda import aligned, launch


def random_bits(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """Bernoulli(rate) bits (rows, words) from a 0-dim int64 seed: P(bit) = round(rate 2^32) / 2^32 exactly."""
    bits = torch.empty(rows, words(columns), dtype=torch.int32, device=seed.device)
    if bits.numel():
        quantised = round(rate * 2**32)
        launch(_cuda.random_bits, seed.device, seed.data_ptr(), rows, columns, quantised, bits.data_ptr())
    return bits


def count_bits(*masks: Tensor) -> Tensor:
    """Set bits of each row of masks of one shape, (masks, N) int32."""
    first = masks[0]
    counts = torch.empty(len(masks), len(first), dtype=torch.int32, device=first.device)
    if first.numel() == 0:
        return counts.zero_()
    for bits, out in zip(map(aligned, masks), counts):
        launch(_cuda.count_bits, bits.device, bits.data_ptr(), *bits.shape, out.data_ptr())
    return counts


def transpose_bits(bits: Tensor, columns: int) -> Tensor:
    """(N, W) -> (columns, words(N)): bit (j, i) of the result is bit (i, j)."""
    bits = aligned(bits)
    out = torch.empty(columns, words(len(bits)), dtype=torch.int32, device=bits.device)
    if out.numel():
        launch(_cuda.transpose_bits, bits.device, bits.data_ptr(), len(bits), columns, out.data_ptr())
    return out


def pairs_from_indices(indices: Tensor, columns: int, symmetric: bool, first_row: int, rows: int) -> Tensor:
    """Bits of the pairs (i, indices[i, n]), indices (N, k) int64, of the rows first_row .. first_row + rows - 1.

    Index -1 is no pair. `symmetric` (columns = N) adds the pairs (indices[i, n], i) and leaves the diagonal out: the
    bits of all lists in the columns asked for are transposed onto the rows, so no list is sorted and no word has two
    owners. That takes as many bits again while it lasts.
    """
    indices = indices.contiguous()
    bits = _set_pairs(indices[first_row : first_row + rows], 0, columns)
    if symmetric and bits.numel():
        others = _set_pairs(indices, first_row, rows)
        launch(_cuda.join_transpose, bits.device, others.data_ptr(), len(others), rows, first_row, bits.data_ptr())
    return bits


def _set_pairs(indices: Tensor, first_column: int, columns: int) -> Tensor:
    bits = torch.empty(len(indices), words(columns), dtype=torch.int32, device=indices.device)
    if bits.numel():
        shape = (*indices.shape, first_column, columns)
        launch(_cuda.set_pairs, indices.device, indices.data_ptr(), *shape, bits.data_ptr())
    return bits
