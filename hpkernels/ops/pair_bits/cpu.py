"""Pair masks as bits on the CPU: the pointer calls into `hpkernels._cpu`.

The layout of a mask is that of hpkernels.common.bits.
"""

import torch
from torch import Tensor

from hpkernels import _cpu
from hpkernels.common.bits import words


def random_bits(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """Independent Bernoulli(rate) bits (rows, W), a function of the 0-dim int64 `seed` and the position alone.

    The probability is `rate` rounded to a multiple of 2^-32; see csrc/shared/philox.h for the generator.
    """
    bits = torch.empty(rows, words(columns), dtype=torch.int32)
    if bits.numel():
        threshold = round(rate * 2**32)
        key = int(seed) & 0xFFFFFFFFFFFFFFFF
        _cpu.random_bits(key, rows, columns, threshold, bits.data_ptr(), torch.get_num_threads())
    return bits


def count_bits(*masks: Tensor) -> Tensor:
    """Set bits of each row of masks of one shape (N, W): (masks, N) int32."""
    rows, width = masks[0].shape
    counts = torch.zeros(len(masks), rows, dtype=torch.int32)
    for bits, out in zip(masks, counts):
        if bits.numel():
            bits = bits.contiguous()
            _cpu.count_bits(bits.data_ptr(), rows, width, out.data_ptr(), torch.get_num_threads())
    return counts


def transpose_bits(bits: Tensor, columns: int) -> Tensor:
    """The mask (N, W) of `columns` columns, transposed: (columns, words(N))."""
    bits = bits.contiguous()
    rows = bits.shape[0]
    out = torch.zeros(columns, words(rows), dtype=torch.int32)
    if bits.numel() and out.numel():
        _cpu.transpose_bits(bits.data_ptr(), rows, columns, out.data_ptr(), torch.get_num_threads())
    return out


def pairs_from_indices(indices: Tensor, columns: int, symmetric: bool, first_row: int, rows: int) -> Tensor:
    """The mask of the pairs (i, indices[i, n]), indices (N, k) int64, -1 = no pair: (rows, words(columns)).

    Of its rows those from first_row on, `rows` of them. `symmetric` adds (indices[i, n], i) and leaves the diagonal
    out; it needs columns == N.
    """
    indices = indices.contiguous()
    total, k = indices.shape
    bits = torch.zeros(rows, words(columns), dtype=torch.int32)
    if indices.numel() and rows:
        _cpu.set_pairs(indices.data_ptr(), total, k, columns, symmetric, first_row, rows, bits.data_ptr())
    return bits
