"""Packed pairs in plain torch: the specification of random bits, counts and transposes.

The layout is in hpkernels/common/bits.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.common.bits import pack, unpack, words


def count_bits(*masks: Tensor) -> Tensor:
    """Set bits of each row of masks of one shape, int32 (masks, N)."""
    bits = torch.stack(masks)
    table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int32, device=bits.device)
    return table[bits.view(torch.uint8).long()].sum(2, dtype=torch.int32)


def transpose_bits(bits: Tensor, columns: int) -> Tensor:
    """(N, words(columns)) -> (columns, words(N))."""
    return pack(unpack(bits, columns).T)


def pairs_from_indices(indices: Tensor, columns: int, symmetric: bool, first_row: int, rows: int) -> Tensor:
    """Rows first_row .. first_row + rows - 1 of the mask of the pairs (i, indices[i, .]); index -1 is skipped.

    With `symmetric` the mirrored pairs too, from all rows of `indices`, and no diagonal.
    """
    own = indices[first_row : first_row + rows]
    dense = torch.zeros(rows, columns + 1, dtype=torch.bool, device=indices.device)  # last column takes the -1s
    dense.scatter_(1, torch.where(own < 0, columns, own), True)
    dense = dense[:, :columns]
    if symmetric:
        named = indices - first_row  # which of the rows asked for each index names; the last column takes the others
        named = torch.where((named < 0) | (named >= rows), rows, named)
        mirror = torch.zeros(columns, rows + 1, dtype=torch.bool, device=indices.device).scatter_(1, named, True)
        dense = dense | mirror[:, :rows].T
        dense.diagonal(first_row).fill_(False)
    return pack(dense)


def pair_sum(bits: Tensor, x: Tensor) -> Tensor:
    """out_i = sum_j B_ij x_j, (N, D), for the mask B (N, words(M)) and x (M, D) in fp32 or fp64."""
    with torch.autocast(x.device.type, enabled=False):
        return unpack(bits, x.shape[0]).to(x.dtype) @ x


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2^32, in int64 without overflow."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors holding 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_bits(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """Independent bits, each set with probability q / 2^32, q = round(rate * 2^32); a function of (seed, row, word).

    Bit-sliced: a word of 32 Bernoulli bits is folded from one random word per binary digit of q, low digit first
    (digit 1: or, digit 0: and), starting at q's lowest set digit. Digit p comes from lane p % 4 of
    Philox(counter = (word, row, p // 4, 0), key = the two halves of seed).
    """
    width, quantised = words(columns), round(rate * 2**32)
    if quantised == 0:
        return torch.zeros(rows, width, dtype=torch.int32, device=seed.device)
    word = torch.arange(width, device=seed.device).expand(rows, width)
    row = torch.arange(rows, device=seed.device)[:, None].expand(rows, width)
    zero = torch.zeros_like(word)
    if quantised == 2**32:
        acc = torch.full_like(word, 0xFFFFFFFF)
    else:
        acc = zero
        key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        first = (quantised & -quantised).bit_length() - 1
        for group in range(first // 4, 8):
            lanes = philox((word, row, torch.full_like(word, group), zero), key)
            for digit in range(max(first, 4 * group), 4 * group + 4):
                plane = lanes[digit % 4]
                acc = acc | plane if quantised >> digit & 1 else acc & plane
    valid = (columns - 32 * word).clamp(0, 32)
    acc = acc & ((1 << valid) - 1)
    return torch.where(acc >= 2**31, acc - 2**32, acc).to(torch.int32)
