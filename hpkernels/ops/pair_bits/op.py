"""torch ops on packed pair masks: random bits, counts, transpose, masks from lists, sums of chosen rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.bits import clear_diagonal, pack, set_pairs, words
from hpkernels.common.checks import look_finite
from hpkernels.ops.common.autograd import refuse_transforms
from hpkernels.ops.pair_bits import reference, sums

# In plain torch on every device, and ops all the same: torch.compile would make of a loop over blocks of rows one graph
# for each number of rows.


@torch.library.custom_op("hpkernels::check_padding", mutates_args=())
def check_padding(bits: Tensor, columns: int) -> Tensor:
    """Raise where bits past the last column are set, which kernels would take for columns. On the CPU, where looking
    takes no wait."""
    if bits.is_cpu and bits.numel():
        first = columns // 32
        valid = torch.tensor([(1 << columns % 32) - 1] + [0] * (bits.shape[1] - first - 1), dtype=torch.int32)
        if first < bits.shape[1] and (bits[:, first:] & ~valid).any():
            raise ValueError(f"bits: expected zeros past the {columns} columns, got bits that are set there")
    return bits.new_empty(0)


@check_padding.register_fake
def _(bits, columns):
    return bits.new_empty(0)


@torch.library.custom_op("hpkernels::pack_bits", mutates_args=())
def pack_bits(dense: Tensor) -> Tensor:
    """bool (N, M) -> (N, words(M))."""
    return pack(dense)


@pack_bits.register_fake
def _(dense):
    return dense.new_empty((dense.shape[0], words(dense.shape[1])), dtype=torch.int32)


_BLOCK_PAIRS = 1 << 22  # pairs of labels that are compared at a time


@torch.library.custom_op("hpkernels::pairs_of_labels", mutates_args=())
def pairs_of_labels(labels: Tensor, takes_part: Tensor) -> Tensor:
    """The mask (N, words(N)) of the pairs i != j with equal labels (N,), of the rows that take part (N,)."""
    n = labels.shape[0]
    bits = torch.empty((n, words(n)), dtype=torch.int32, device=labels.device)
    step = max(1, _BLOCK_PAIRS // max(1, n))
    for first in range(0, n, step):  # what equals a row that takes part does, too
        bits[first : first + step] = pack((labels[first : first + step, None] == labels) & takes_part)
    return clear_diagonal(bits, n)


@pairs_of_labels.register_fake
def _(labels, takes_part):
    n = labels.shape[0]
    return labels.new_empty((n, words(n)), dtype=torch.int32)


@torch.library.custom_op("hpkernels::random_bits", mutates_args=())
def random_bits(seed: Tensor, rows: int, columns: int, rate: float, backend: str) -> Tensor:
    """Bernoulli bits from a counter-based generator, the same on every backend. See reference.random_bits."""
    return dispatch.function("pair_bits", "random_bits", backend, seed)(seed, rows, columns, rate)


@random_bits.register_fake
def _(seed, rows, columns, rate, backend):
    return seed.new_empty((rows, words(columns)), dtype=torch.int32)


@torch.library.custom_op("hpkernels::count_bits", mutates_args=())
def count_bits(masks: Sequence[Tensor], backend: str) -> Tensor:
    """Set bits of each row of masks of one shape (N, W), int32 (masks, N)."""
    return dispatch.function("pair_bits", "count_bits", backend, masks[0])(*masks)


@count_bits.register_fake
def _(masks, backend):
    return masks[0].new_empty((len(masks), masks[0].shape[0]), dtype=torch.int32)


@torch.library.custom_op("hpkernels::transpose_bits", mutates_args=())
def transpose_bits(bits: Tensor, columns: int, backend: str) -> Tensor:
    """(N, words(columns)) -> (columns, words(N))."""
    return dispatch.function("pair_bits", "transpose_bits", backend, bits)(bits, columns)


@transpose_bits.register_fake
def _(bits, columns, backend):
    return bits.new_empty((columns, words(bits.shape[0])))


@torch.library.custom_op("hpkernels::pairs_from_indices", mutates_args=())
def pairs_from_indices(
    indices: Tensor, columns: int, symmetric: bool, first_row: int, rows: int, backend: str
) -> Tensor:
    """Rows first_row .. first_row + rows - 1 of the mask of the pairs (i, indices[i, .]), indices (N, k).

    With `symmetric` also the mirrored pairs, without the diagonal; columns is N then.
    """
    pairs = dispatch.function("pair_bits", "pairs_from_indices", backend, indices)
    return pairs(indices, columns, symmetric, first_row, rows)


@pairs_from_indices.register_fake
def _(indices, columns, symmetric, first_row, rows, backend):
    return indices.new_empty((rows, words(columns)), dtype=torch.int32)


def pair_sum(bits: Tensor, symmetric: bool, x: Tensor, backend: str) -> Tensor:
    """sum_j B_ij x_j, (N, D), for the mask (N, words(M)) and x (M, D) in fp32 or fp64. Differentiable in x, any number
    of times."""
    look_finite("x", x)  # of x alone: a gradient that is not finite is not the caller's argument
    if backend == "reference":
        return reference.pair_sum(bits, x)
    refuse_transforms(x)
    return _pair_sum(bits, symmetric, x, backend)


@torch.library.custom_op("hpkernels::pair_sum", mutates_args=())
def _pair_sum(bits: Tensor, symmetric: bool, x: Tensor, backend: str) -> Tensor:
    counts = dispatch.function("pair_bits", "count_bits", backend, bits)(bits)[0] if x.is_cpu else None
    return sums.pair_sum(bits, x, counts)


@_pair_sum.register_fake
def _(bits, symmetric, x, backend):
    return x.new_empty((bits.shape[0], x.shape[1]))


def _setup_sum(ctx, inputs, output):
    bits, ctx.symmetric, x, ctx.backend = inputs
    ctx.columns = x.shape[0]
    ctx.save_for_backward(bits)


def _backward_sum(ctx, grad):
    (bits,) = ctx.saved_tensors
    turned = bits if ctx.symmetric else transpose_bits(bits, ctx.columns, ctx.backend)
    return None, None, _pair_sum(turned, ctx.symmetric, grad, ctx.backend), None


_pair_sum.register_autograd(_backward_sum, setup_context=_setup_sum)


@torch.library.custom_op("hpkernels::pairs_from_coo", mutates_args=())
def pairs_from_coo(indices: Tensor, rows: int, columns: int) -> Tensor:
    """The mask (rows, words(columns)) of the pairs indices (2, E), int64. Waits for a GPU."""
    row, column = indices
    if indices.shape[1]:
        for name, index, end in (("row", row, rows), ("column", column, columns)):
            low, high = (int(bound) for bound in torch.aminmax(index))
            if low < 0 or high >= end:
                raise ValueError(f"indices: expected {name}s from 0 to {end - 1}, got {low if low < 0 else high}")
    return set_pairs(row, column, rows, columns)


@pairs_from_coo.register_fake
def _(indices, rows, columns):
    return indices.new_empty((rows, words(columns)), dtype=torch.int32)
