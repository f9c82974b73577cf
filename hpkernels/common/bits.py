"""The layout of packed pairs, and packing in plain torch.

A mask of N x M pairs is an int32 tensor (N, W), W = words(M): bit (i, j) is bit j % 32 of word j // 32 of row i.
Rows are multiples of 16 bytes; padding bits are always zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_PAIRS = 1 << 22  # bounds the scratch of packing, so that it stays in a cache


def words(columns: int) -> int:
    """int32 words in a row of `columns` bits."""
    return 4 * ((columns + 127) // 128)


def pack(dense: Tensor) -> Tensor:
    """bool (N, M) -> int32 (N, words(M))."""
    rows, columns = dense.shape
    width = words(columns) * 32
    if columns == 0:  # no view of such a tensor as other numbers
        return torch.empty(rows, 0, dtype=torch.int32, device=dense.device)
    octets = torch.empty(rows, width // 8, dtype=torch.uint8, device=dense.device)
    step = max(1, _CHUNK_PAIRS // max(width, 1))
    for first in range(0, rows, step):
        chunk = dense[first : first + step]
        # A copy whose rows follow one another: what is contiguous to torch may still have the strides of its source.
        padded = dense.new_zeros(chunk.shape[0], width)
        padded[:, :columns] = chunk
        # Eight bools are an int64, and byte 7 of its product is their octet: bool n, of weight 2^8n, times 2^(56 - 7n).
        octets[first : first + step] = padded.view(torch.int64) * 0x0102040810204080 >> 56
    return octets.view(torch.int32)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """int32 (N, W) -> bool (N, columns)."""
    if bits.numel() == 0:
        return torch.zeros(bits.shape[0], columns, dtype=torch.bool, device=bits.device)
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits.contiguous().view(torch.uint8)[..., None] >> shifts) & 1).bool().flatten(1)[:, :columns]


def list_pairs(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64, of the bits that are set, in the order of the rows. Waits for a GPU."""
    row, word = bits.nonzero(as_tuple=True)
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    entry, bit = ((bits[row, word][:, None] >> shifts) & 1).nonzero(as_tuple=True)
    return row[entry], word[entry] * 32 + bit


def set_pairs(row: Tensor, column: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, words(columns)) from rows and columns, int64, in any order, some of them twice. Waits for a GPU."""
    width = words(columns) * 32
    places = torch.unique(row * width + column)  # no bit is added twice
    octets = torch.zeros(rows * width // 8, dtype=torch.uint8, device=row.device)
    octets.index_add_(0, places >> 3, torch.bitwise_left_shift(1, places & 7).to(torch.uint8))
    return octets.view(torch.int32).view(rows, words(columns))


def clear_diagonal(bits: Tensor, columns: int, first_row: int = 0) -> Tensor:
    """Clears the pairs (i, i) of the rows i = first_row + r, in place; returns `bits`."""
    row = torch.arange(max(0, min(bits.shape[0], columns - first_row)), device=bits.device)
    column = first_row + row
    word, bit = (column >> 5)[:, None], torch.bitwise_left_shift(torch.ones_like(column), column & 31).int()[:, None]
    kept = bits[: len(row)]
    kept.scatter_(1, word, kept.gather(1, word) & ~bit)
    return bits
