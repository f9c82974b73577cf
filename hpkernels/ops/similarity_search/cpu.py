"""The search ops on `hpkernels._cpu`: exact decisions and values of the fp32 (or fp64) inner product.

Inputs of any float dtype and layout: bf16 and fp16 are promoted to fp32 (exactly), all to fp64 if one operand is fp64.
A non-finite query or key raises ValueError naming the argument.
"""

import torch

from hpkernels import _cpu


def max_similarity(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """max_k <q_i, key_k> of queries (N, C) and keys (M, C), M >= 1 -> (N,)."""
    queries, keys, suffix = _promote(queries, keys)
    values = queries.new_empty(len(queries))
    function = getattr(_cpu, "max_similarity_" + suffix)
    function(queries.data_ptr(), len(queries), keys.data_ptr(), len(keys), keys.shape[1], values.data_ptr(), _threads())
    return values


def topk_similarity(
    queries: torch.Tensor,
    keys: torch.Tensor,
    k: int,
    exclude_self: bool,
    query_groups: torch.Tensor | None,
    key_groups: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest <q_i, key_j> per row, descending, exact ties to the lower index; missing places are -inf and -1.

    queries (N, C), keys (M, C); groups (N,) and (M,) int64, both or none -> values fp32 (N, k), indices int64 (N, k).
    """
    queries, keys, suffix = _promote(queries, keys)
    groups = [None if group is None else group.contiguous() for group in (query_groups, key_groups)]
    values = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    function = getattr(_cpu, "topk_similarity_" + suffix)
    function(
        queries.data_ptr(),
        len(queries),
        keys.data_ptr(),
        len(keys),
        keys.shape[1],
        k,
        exclude_self,
        *(0 if group is None else group.data_ptr() for group in groups),
        values.data_ptr(),
        indices.data_ptr(),
        _threads(),
    )
    return values.float(), indices


def pairs_above(
    x: torch.Tensor, thresholds: torch.Tensor, keys: torch.Tensor | None, key_thresholds: torch.Tensor | None
) -> torch.Tensor:
    """Bits of the pairs above their threshold, int32 (N, 4 ceil(M / 128)).

    keys None: [i != j] and s_ij > min(t_i, t_j), symmetric. With keys: s_ij > t_i, or s_ij > min(t_i, kt_j) with
    key_thresholds. x (N, C), keys (M, C), thresholds (N,), key_thresholds (M,).
    """
    symmetric = keys is None
    x, keys, suffix = _promote(x, x if symmetric else keys)
    thresholds = thresholds.to(x.dtype).contiguous()
    if symmetric:
        key_thresholds = thresholds
    elif key_thresholds is not None:
        key_thresholds = key_thresholds.to(x.dtype).contiguous()
    words = (len(keys) + 127) // 128 * 4
    bits = torch.empty(len(x), words, dtype=torch.int32)
    function = getattr(_cpu, "pairs_above_" + suffix)
    function(
        x.data_ptr(),
        len(x),
        keys.data_ptr(),
        len(keys),
        keys.shape[1],
        symmetric,
        thresholds.data_ptr(),
        0 if key_thresholds is None else key_thresholds.data_ptr(),
        bits.data_ptr(),
        words,
        _threads(),
    )
    return bits


def _promote(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Both operands contiguous in fp64 if one of them is fp64, else in fp32; and the name of that type in _cpu."""
    double = torch.float64 in (x.dtype, y.dtype)
    dtype = torch.float64 if double else torch.float32
    promoted = x.to(dtype).contiguous()
    return promoted, promoted if y is x else y.to(dtype).contiguous(), "f64" if double else "f32"


def _threads() -> int:
    return torch.get_num_threads()
