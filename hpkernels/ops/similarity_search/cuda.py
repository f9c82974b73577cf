"""The search ops on `hpkernels._cuda`: fp32 sums of exact bf16, fp16 or IEEE fp32 products; nothing is synchronised.

Operands of one dtype run in it, others are promoted to fp32 (exactly). NaN is never above a threshold nor among the
k best; a row's maximum is NaN if one of its products is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import _cuda
from hpkernels.common.bits import words
from hpkernels.ops.common.cuda import SUFFIX, TILE, launch, require_supported, shares_of_columns, whole_chunks
from hpkernels.ops.common.gpu import common_dtype, decode_keys

_LARGEST_LIST = 256  # k of the fused search; above it ordered keys go through torch.topk
_KEY_BYTES = 256 << 20  # bound of the ordered keys alive at a time for larger k


def max_similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """max_k <q_i, key_k> of queries (N, C) and keys (M, C), M >= 1 -> (N,) fp32."""
    queries, keys = _operands(queries, keys)
    splits = _splits(queries, keys)
    out = torch.empty(splits, len(queries), dtype=torch.float32, device=queries.device)
    if out.numel():
        _launch("max_similarity", queries, *_rows(queries), *_rows(keys), queries.shape[1], splits, out.data_ptr())
    return out.amax(0)


def topk_similarity(
    queries: Tensor, keys: Tensor, k: int, exclude_self: bool, query_groups: Tensor | None, key_groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k largest <q_i, key_j> per row, descending, exact ties to the lower index; missing places are -inf and -1.

    queries (N, C), keys (M, C); groups (N,) and (M,) int64, both or none -> values fp32 (N, k), indices int64 (N, k).
    """
    queries, keys = _operands(queries, keys)
    n, device = len(queries), queries.device
    if n == 0:
        return queries.new_empty(0, k, dtype=torch.float32), torch.empty(0, k, dtype=torch.int64, device=device)
    row_ids = None
    choice = (exclude_self, 0, 0, 0, 0)
    if query_groups is not None:  # in order of group a block's rows share a range of keys
        query_groups, row_ids = query_groups.sort(stable=True)
        key_groups, key_ids = key_groups.sort(stable=True)
        queries, keys = queries[row_ids], keys[key_ids]
        choice = (exclude_self, *(x.data_ptr() for x in (query_groups, key_groups, row_ids, key_ids)))
    best = (_fused if k <= _LARGEST_LIST else _unfused)(queries, keys, k, choice)
    values, indices = decode_keys(best)
    if row_ids is None:
        return values, indices
    return torch.empty_like(values).index_copy_(0, row_ids, values), torch.empty_like(indices).index_copy_(
        0, row_ids, indices
    )


def pairs_above(x: Tensor, thresholds: Tensor, keys: Tensor | None, key_thresholds: Tensor | None) -> Tensor:
    """Bits of the pairs above their threshold, int32 (N, 4 ceil(M / 128)).

    keys None: [i != j] and s_ij > min(t_i, t_j), symmetric. With keys: s_ij > t_i, or s_ij > min(t_i, kt_j) with
    key_thresholds. x (N, C), keys (M, C), thresholds (N,), key_thresholds (M,).
    """
    symmetric = keys is None
    x, keys = _operands(x, x if symmetric else keys)
    thresholds = thresholds.float().contiguous()
    if symmetric:
        key_thresholds = thresholds
    elif key_thresholds is not None:
        key_thresholds = key_thresholds.float().contiguous()
    bits = torch.empty(len(x), words(len(keys)), dtype=torch.int32, device=x.device)
    if bits.numel():
        _launch("pairs_above", x, *_rows(x), *_rows(keys), x.shape[1], symmetric, thresholds.data_ptr(),
                0 if key_thresholds is None else key_thresholds.data_ptr(), bits.data_ptr())  # fmt: skip
    return bits


def _fused(queries: Tensor, keys: Tensor, k: int, choice: tuple) -> Tensor:
    """The ordered keys (N, k) of the k best, k <= _LARGEST_LIST, descending."""
    n, device = len(queries), queries.device
    splits = _splits(queries, keys)
    size = 256 if k <= 128 else 512  # of a row's list: k kept and 128 new ones of a tile
    scratch = 0 if k == 1 else -(-n // TILE) * TILE * splits * size
    lists = torch.empty(scratch, dtype=torch.int64, device=device)
    out = torch.empty(n, splits, k, dtype=torch.int64, device=device)
    _launch("topk_similarity", queries, *_rows(queries), *_rows(keys), queries.shape[1], k, *choice, splits, size,
            lists.data_ptr(), out.data_ptr())  # fmt: skip
    # The keys of a row are distinct and carry the order, so the merge of the splits is exact.
    return out[:, 0] if splits == 1 else out.flatten(1).topk(k, dim=1).values


def _unfused(queries: Tensor, keys: Tensor, k: int, choice: tuple) -> Tensor:
    """The ordered keys (N, k) of the k best: row blocks of all keys through torch.topk, _KEY_BYTES at a time."""
    n, m = len(queries), len(keys)
    step = min(n, max(TILE, _KEY_BYTES // (8 * m) // TILE * TILE))
    scratch = torch.empty(step, m, dtype=torch.int64, device=queries.device)
    best = torch.empty(n, k, dtype=torch.int64, device=queries.device)
    for first in range(0, n, step):
        last = min(first + step, n)
        _launch("ordered_keys", queries, queries.data_ptr(), first, last, *_rows(keys), queries.shape[1], *choice,
                scratch.data_ptr())  # fmt: skip
        best[first:last] = scratch[: last - first].topk(k, dim=1).values
    return best


def _operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, their rows whole 16-byte chunks."""
    require_supported(queries=a, keys=b)
    dtype = common_dtype(a, b)
    prepared = whole_chunks(a.to(dtype))
    return prepared, prepared if b is a else whole_chunks(b.to(dtype))


def _rows(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), len(x)


def _splits(queries: Tensor, keys: Tensor) -> int:
    return shares_of_columns(-(-len(queries) // TILE), len(keys), queries.device)


def _launch(function: str, x: Tensor, *arguments: int) -> None:
    launch(getattr(_cuda, f"{function}_{SUFFIX[x.dtype]}"), x.device, *arguments)
