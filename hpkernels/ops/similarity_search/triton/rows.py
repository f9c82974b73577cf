"""The largest products of each row: panels of queries against tiles of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels import tuning
from hpkernels.ops.common.gpu import decode_keys
from hpkernels.ops.common.triton import (
    key_value,
    on_device,
    ordered_key,
    precision,
    require_supported,
    split_tiles,
    tile_product,
)
from hpkernels.ops.similarity_search.triton.operands import descriptors, operands, products
from hpkernels.tuning import dtype_class

# BLOCK_M x BLOCK_N pairs a tile, products in steps of BLOCK_K.
_TILES = {
    "half": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "single": dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=3),
}
# The list of the k best takes registers, so long lists get smaller panels. Key: dtype class, largest k, ascending.
_TOPK_TILES = {
    ("half", 1): _TILES["half"],
    ("half", 32): dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    ("half", 256): dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3),
    ("single", 32): dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=8, num_stages=2),
    ("single", 128): dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=1),
    ("single", 256): dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2),
}
_SMALLEST_LIST = 16  # places of a list of the k best; the tuning tables say how many it may have
_KEY_BYTES = 256 << 20  # bound of the int64 keys alive at a time when k is longer than a list


@triton.jit
def _max_similarity_panel_kernel(
    q_ptr, k_ptr, q_tiles, k_tiles, out_ptr, N, M, C, stride_q, stride_k, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, i] = max over the split's keys of <q_i, key>; NaN if any product is."""
    tl.assume(C > 0)
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    # The running maxima of a quarter of a tile's columns: one instruction a pair, one reduction at the end, and
    # registers left for large tiles.
    best = tl.full([BLOCK_M, BLOCK_N // 4], float("-inf"), tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(M, BLOCK_N))
    for tile in tl.range(split * tiles_per_split, last, flatten=q_tiles is not None):
        first_col = tl.maximum(tl.minimum(tile * BLOCK_N, M - BLOCK_N), 0)  # some keys again: no new maximum
        cols = tl.minimum(first_col + tl.arange(0, BLOCK_N), M - 1)
        s = products(
            q_ptr, k_ptr, q_tiles, k_tiles, first_row, first_col, tl.minimum(rows, N - 1), cols, C, stride_q, stride_k,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        quarters = tl.permute(tl.reshape(s, [BLOCK_M, 2, 2, BLOCK_N // 4]), [0, 3, 1, 2])
        even, odd = tl.split(quarters)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        best = _larger(_larger(_larger(_larger(best, first), second), third), fourth)
    value = tl.max(best, 1)
    poisoned = tl.max((best != best).to(tl.int32), 1) > 0
    tl.store(out_ptr + split.to(tl.int64) * N + rows, tl.where(poisoned, float("nan"), value), mask=rows < N)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


def max_similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """max_k <q_i, key_k>, (N,) fp32."""
    require_supported(queries=queries, keys=keys)
    queries, keys = operands(queries, keys)
    (n, c), m = queries.shape, keys.shape[0]
    config = tuning.lookup("max_similarity", queries.dtype, c, n, queries.device)
    panels = triton.cdiv(n, config["BLOCK_M"])
    splits, tiles_per_split = split_tiles(panels, triton.cdiv(m, config["BLOCK_N"]), queries.device)
    out = torch.empty((splits, n), dtype=torch.float32, device=queries.device)
    if n:
        copies = config.pop("descriptors") and m >= config["BLOCK_N"]  # which give zeros for keys that are missing
        tiles = descriptors(queries, keys, config) if copies else (None, None)
        with on_device(queries):
            _max_similarity_panel_kernel[(panels, splits)](
                queries, keys, *tiles, out, n, m, c, queries.stride(0), keys.stride(0), tiles_per_split,
                PRECISION=precision(queries.dtype), **config,
            )  # fmt: skip
    return out[0] if splits == 1 else out.amax(0)


@triton.jit
def _allowed(rows, cols, query_group, key_group, M, HAS_GROUPS: tl.constexpr, EXCLUDE_SELF: tl.constexpr):
    """Which pairs of a tile may be chosen."""
    allowed = (cols < M)[None, :] & (rows >= 0)[:, None]
    if EXCLUDE_SELF:
        allowed = allowed & (rows[:, None] != cols[None, :])
    if HAS_GROUPS:
        allowed = allowed & (query_group[:, None] == key_group[None, :])
    return allowed


@triton.jit
def _topk_similarity_best_kernel(
    q_ptr, k_ptr, query_group_ptr, key_group_ptr, out_ptr, N, M, C, stride_q, stride_k, tiles_per_split,
    HAS_GROUPS: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k = 1: out[i, split] = the ordered key of the best of the split's keys."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    valid_rows = tl.minimum(rows, N - 1)
    query_group = tl.load(query_group_ptr + valid_rows) if HAS_GROUPS else rows
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK_M], tl.int32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(M, BLOCK_N))
    for tile in range(split * tiles_per_split, last):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_cols = tl.minimum(cols, M - 1)
        key_group = tl.load(key_group_ptr + valid_cols) if HAS_GROUPS else cols
        allowed = _allowed(rows, cols, query_group, key_group, M, HAS_GROUPS, EXCLUDE_SELF)
        s = tile_product(
            q_ptr, k_ptr, valid_rows, valid_cols, C, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        s = tl.where(allowed, s, float("-inf"))
        value = tl.max(s, 1)
        at = tl.min(tl.where(s == value[:, None], cols[None, :], 0x7FFFFFFF), 1)
        better = value > best  # strictly: an equal value of a later tile has a higher index
        best = tl.where(better, value, best)
        best_at = tl.where(better, at, best_at)
    out_at = rows.to(tl.int64) * tl.num_programs(1) + split
    tl.store(out_ptr + out_at, ordered_key(best, best_at), mask=rows < N)


@triton.jit
def _topk_similarity_panel_kernel(
    q_ptr, k_ptr, query_group_ptr, key_group_ptr, out_ptr, N, M, C, stride_q, stride_k, tiles_per_split, k,
    HAS_GROUPS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i, split, :k] = ordered keys of the k best of the split's keys, in no order.

    Each row keeps an unordered list and the list's least key theta. A tile's entries above theta replace it one at a
    time, best first; once the lists have warmed up most tiles only compare. Keys come in ascending index, so an entry
    equal to theta's value never displaces it: ties go to the lower index.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    valid_rows = tl.minimum(rows, N - 1)
    query_group = tl.load(query_group_ptr + valid_rows) if HAS_GROUPS else rows
    slots = tl.arange(0, SLOTS)
    # Distinct empty keys below every number's; the slots past k hold a key that is never the least.
    empty = tl.where(slots < k, slots.to(tl.int64) - 0x7FFFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF)
    best = tl.zeros([BLOCK_M, SLOTS], tl.int64) + empty[None, :]
    theta_key = tl.min(best, 1)
    theta = key_value(theta_key)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(M, BLOCK_N))
    for tile in range(split * tiles_per_split, last):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_cols = tl.minimum(cols, M - 1)
        key_group = tl.load(key_group_ptr + valid_cols) if HAS_GROUPS else cols
        allowed = _allowed(rows, cols, query_group, key_group, M, HAS_GROUPS, EXCLUDE_SELF)
        s = tile_product(
            q_ptr, k_ptr, valid_rows, valid_cols, C, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        s = tl.where(allowed, s, float("-inf"))
        value = tl.max(s, 1)
        while tl.max((value > theta).to(tl.int32), 0) > 0:
            at = tl.min(tl.where(s == value[:, None], cols[None, :], 0x7FFFFFFF), 1)
            replace = (best == theta_key[:, None]) & (value > theta)[:, None]
            best = tl.where(replace, ordered_key(value, at)[:, None], best)
            theta_key = tl.min(best, 1)
            theta = key_value(theta_key)
            s = tl.where(cols[None, :] == at[:, None], float("-inf"), s)
            value = tl.max(s, 1)
    out_at = (rows.to(tl.int64) * tl.num_programs(1) + split)[:, None] * k + slots[None, :]
    tl.store(out_ptr + out_at, best, mask=(rows < N)[:, None] & (slots < k)[None, :])


@triton.jit
def _topk_similarity_keys_kernel(
    q_ptr, k_ptr, query_group_ptr, key_group_ptr, out_ptr, first_row, N, M, C, stride_q, stride_k,
    HAS_GROUPS: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i - first_row, j] = the ordered key of pair (i, j): the unfused route for long lists."""
    local = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_row + local
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_rows, valid_cols = tl.minimum(rows, N - 1), tl.minimum(cols, M - 1)
    query_group = tl.load(query_group_ptr + valid_rows) if HAS_GROUPS else rows
    key_group = tl.load(key_group_ptr + valid_cols) if HAS_GROUPS else cols
    allowed = _allowed(rows, cols, query_group, key_group, M, HAS_GROUPS, EXCLUDE_SELF)
    s = tile_product(q_ptr, k_ptr, valid_rows, valid_cols, C, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    keys = ordered_key(tl.where(allowed, s, float("-inf")), tl.zeros([BLOCK_M, BLOCK_N], tl.int32) + cols[None, :])
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    tl.store(out_ptr + local.to(tl.int64)[:, None] * M + cols[None, :], keys, mask=inside)


def topk_similarity(
    queries: Tensor, keys: Tensor, k: int, exclude_self: bool, query_groups: Tensor | None, key_groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k largest products of each row, descending, exact ties to the lower index; missing places -inf and -1."""
    require_supported(queries=queries, keys=keys)
    queries, keys = operands(queries, keys)
    (n, c), m = queries.shape, keys.shape[0]
    if n == 0 or k == 0:
        return queries.new_empty((n, k), dtype=torch.float32), queries.new_empty((n, k), dtype=torch.int64)
    has_groups = query_groups is not None
    groups = (query_groups.contiguous(), key_groups.contiguous()) if has_groups else (queries, keys)
    if k > tuning.lookup("topk_similarity", queries.dtype, c, n, queries.device)["longest_list"]:
        return _topk_unfused(queries, keys, k, exclude_self, has_groups, groups)
    kind = dtype_class(queries.dtype)
    config = next(tile for (name, longest), tile in _TOPK_TILES.items() if name == kind and k <= longest)
    panels = triton.cdiv(n, config["BLOCK_M"])
    splits, tiles_per_split = split_tiles(panels, triton.cdiv(m, config["BLOCK_N"]), queries.device)
    lists = torch.empty((n, splits * k), dtype=torch.int64, device=queries.device)
    arguments = (queries, keys, *groups, lists, n, m, c, queries.stride(0), keys.stride(0), tiles_per_split)
    options = dict(
        HAS_GROUPS=has_groups, EXCLUDE_SELF=exclude_self,
        PRECISION=precision(queries.dtype, full=True), **config,
    )  # fmt: skip
    with on_device(queries):
        if k == 1:
            _topk_similarity_best_kernel[(panels, splits)](*arguments, **options)
        else:
            slots = max(_SMALLEST_LIST, triton.next_power_of_2(k))
            _topk_similarity_panel_kernel[(panels, splits)](*arguments, k, SLOTS=slots, **options)
    # The keys of a row are distinct and carry the order, so the merge of the splits and the sort are exact.
    return decode_keys(lists.topk(k, dim=1).values)


def _topk_unfused(
    queries: Tensor, keys: Tensor, k: int, exclude_self: bool, has_groups: bool, groups: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Row blocks of ordered keys through torch.topk, at most _KEY_BYTES of them at a time."""
    (n, c), m = queries.shape, keys.shape[0]
    config = _TILES[dtype_class(queries.dtype)]
    block = config["BLOCK_M"]
    step = min(n, max(block, _KEY_BYTES // (8 * m) // block * block))
    scratch = torch.empty((step, m), dtype=torch.int64, device=queries.device)
    best = torch.empty((n, k), dtype=torch.int64, device=queries.device)
    for first in range(0, n, step):
        rows = min(step, n - first)
        with on_device(queries):
            _topk_similarity_keys_kernel[(triton.cdiv(m, config["BLOCK_N"]), triton.cdiv(rows, block))](
                queries, keys, *groups, scratch, first, first + rows, m, c, queries.stride(0), keys.stride(0),
                HAS_GROUPS=has_groups, EXCLUDE_SELF=exclude_self,
                PRECISION=precision(queries.dtype, full=True), **config,
            )  # fmt: skip
        best[first : first + rows] = scratch[:rows].topk(k, dim=1).values
    return decode_keys(best)
