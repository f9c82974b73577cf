"""Pair bits on `hpkernels._cuda`: counter-based random bits, counts, transposition, pairs from index lists."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import _cuda
from hpkernels._bits import words
from hpkernels.ops._cuda import aligned, launch


def random_bits(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """Bernoulli(rate) bits (rows, words) from a 0-dim int64 seed: P(bit) = round(rate 2^32) / 2^32 exactly."""
    bits = torch.empty(rows, words(columns), dtype=torch.int32, device=seed.device)
    if bits.numel():
        quantised = round(rate * 2**32)
        launch(_cuda.random_bits, seed.device, seed.data_ptr(), rows, columns, quantised, bits.data_ptr())
    return bits


def count_bits(bits: Tensor) -> Tensor:
    """Set bits of each row, (N,) int32."""
    bits = aligned(bits)
    counts = torch.zeros(len(bits), dtype=torch.int32, device=bits.device)
    if bits.numel():
        launch(_cuda.count_bits, bits.device, bits.data_ptr(), *bits.shape, counts.data_ptr())
    return counts


def transpose_bits(bits: Tensor, columns: int) -> Tensor:
    """(N, W) -> (columns, words(N)): bit (j, i) of the result is bit (i, j)."""
    bits = aligned(bits)
    out = torch.empty(columns, words(len(bits)), dtype=torch.int32, device=bits.device)
    if out.numel():
        launch(_cuda.transpose_bits, bits.device, bits.data_ptr(), len(bits), columns, out.data_ptr())
    return out


def pairs_from_indices(indices: Tensor, columns: int, symmetric: bool) -> Tensor:
    """Bits of the pairs (i, indices[i, n]), indices (N, k) int64; index -1 is no pair.

    `symmetric` (columns = N) adds the pairs (indices[i, n], i) and leaves the diagonal out: each 128 x 128 tile is
    joined with its mirror image in place, so no list is sorted and no word has two owners.
    """
    indices = indices.contiguous()
    bits = torch.empty(len(indices), words(columns), dtype=torch.int32, device=indices.device)
    if bits.numel():
        launch(_cuda.set_pairs, indices.device, indices.data_ptr(), *indices.shape, columns, symmetric, bits.data_ptr())
    return bits
