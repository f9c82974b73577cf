"""The search ops on `hpkernels._cpu`: exact decisions and values of the fp32 (or fp64) inner product.

Inputs of any float dtype and layout: bf16 and fp16 are promoted to fp32 (exactly), all to fp64 if one operand is fp64.
A non-finite query or key raises ValueError naming the argument.
"""

import torch
from torch import Tensor

from hpkernels.common.bits import words
from hpkernels.ops.common.cpu import kernel, working_dtype


def max_similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """max_k <q_i, key_k> of queries (N, C) and keys (M, C), M >= 1 -> (N,)."""
    queries, keys = _promote(queries, keys)
    values = queries.new_empty(len(queries))
    kernel("max_similarity", queries.dtype)(
        queries.data_ptr(), len(queries), keys.data_ptr(), len(keys), keys.shape[1], values.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return values


def topk_similarity(
    queries: Tensor, keys: Tensor, k: int, exclude_self: bool, query_groups: Tensor | None, key_groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k largest <q_i, key_j> per row, descending, exact ties to the lower index; missing places are -inf and -1.

    queries (N, C), keys (M, C); groups (N,) and (M,) int64, both or none -> values fp32 (N, k), indices int64 (N, k).
    """
    queries, keys = _promote(queries, keys)
    groups = [None if group is None else group.contiguous() for group in (query_groups, key_groups)]
    values = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    kernel("topk_similarity", queries.dtype)(
        queries.data_ptr(), len(queries), keys.data_ptr(), len(keys), keys.shape[1], k, exclude_self,
        *(0 if group is None else group.data_ptr() for group in groups),
        values.data_ptr(), indices.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return values.float(), indices


def pairs_above(x: Tensor, thresholds: Tensor, keys: Tensor | None, key_thresholds: Tensor | None) -> Tensor:
    """Bits of the pairs above their threshold, int32 (N, words(M)).

    keys None: [i != j] and s_ij > min(t_i, t_j), symmetric. With keys: s_ij > t_i, or s_ij > min(t_i, kt_j) with
    key_thresholds. x (N, C), keys (M, C), thresholds (N,), key_thresholds (M,).
    """
    symmetric = keys is None
    x, keys = _promote(x, x if symmetric else keys)
    thresholds = thresholds.to(x.dtype).contiguous()
    if symmetric:
        key_thresholds = thresholds
    elif key_thresholds is not None:
        key_thresholds = key_thresholds.to(x.dtype).contiguous()
    bits = torch.empty(len(x), words(len(keys)), dtype=torch.int32)
    kernel("pairs_above", x.dtype)(
        x.data_ptr(), len(x), keys.data_ptr(), len(keys), keys.shape[1], symmetric, thresholds.data_ptr(),
        0 if key_thresholds is None else key_thresholds.data_ptr(), bits.data_ptr(), bits.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip
    return bits


def _promote(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands contiguous in fp64 if one of them is fp64, else in fp32."""
    dtype = working_dtype(x, y)
    promoted = x.to(dtype).contiguous()
    return promoted, promoted if y is x else y.to(dtype).contiguous()
