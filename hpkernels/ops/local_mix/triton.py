"""Local hidden positives in Triton: neighbour weights from attention, or from queries and keys, and nine-tap mixing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.gpu import padded_rows
from hpkernels.ops.common.triton import on_device, precision, require_supported, same_dtype, tile_product
from hpkernels.ops.local_mix.weighting import Weighting
from hpkernels.tuning import dtype_class

_LOWEST = tl.constexpr(-1e30)  # stands for logits of -inf, so that quantiles stay numbers
_ROW_NUMBERS, _WARP_NUMBERS = 4096, 1024  # logits that a program, and a warp, holds
_LONGEST_ROW = 32 * _WARP_NUMBERS  # of as many warps as a program can have
_MIX_TOKENS, _MIX_CHANNELS, _MIX_WARPS = 32, 64, 4

# From queries and keys: tiles of logits into a workspace of at most _WORKSPACE_BYTES, or of one row.
_LOGIT_TILES = {
    "half": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "single": dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
}
_WORKSPACE_BYTES = 64 << 20
_LARGEST_GRID = 65535  # programs along an axis that is not the first


@triton.jit
def _head_mean(base_ptr, offsets, mask, heads, stride_head):
    """Mean over the heads of logits at `offsets`, in fp32, always in the order of the heads."""
    total = tl.zeros(offsets.shape, tl.float32)
    for _ in range(heads):
        logits = tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.maximum(logits, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
        base_ptr += stride_head  # added head by head: head * stride_head may leave int32
    return total / heads


@triton.jit
def _ordered(values):
    """uint32 whose order is that of the fp32 values."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) | -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _unordered(keys):
    """The fp32 values of ordered keys."""
    bits = keys.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, bits ^ -2147483648, ~bits)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def _quantile(keys, statistic, rank, fraction, T):
    """Linear interpolation between order statistics rank and rank + 1, given the key of the first.

    keys past the row's end are the largest there is, so they are neither counted nor the least above.
    """
    count = tl.sum((keys <= statistic[:, None]).to(tl.int32), 1)
    # The minimum is taken over signed numbers of the same order.
    above = tl.where(keys > statistic[:, None], keys, 0xFFFFFFFF) ^ 0x80000000
    least_above = tl.min(above.to(tl.int32, bitcast=True), 1).to(tl.uint32, bitcast=True) ^ 0x80000000
    following = tl.where((count > rank + 1) | (rank + 1 >= T), statistic, least_above)
    a, b = _unordered(statistic), _unordered(following)
    return tl.where(fraction < 0.5, a + fraction * (b - a), b - (b - a) * (1.0 - fraction))


@triton.jit
def _store_weights(
    out_ptr, out_row, a, valid, stored, token, T, height, width,
    sigma, low_rank, low_fraction, high_rank, high_fraction, log_tokens,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Nine weights of each of BLOCK_R tokens, from all their logits a [BLOCK_R, BLOCK_T], to rows out_row of out.

    The two quantiles come from exact order statistics, found bit by bit: the largest key v with at most `rank` keys
    below it is the statistic of that rank. Both counts of a step share one sum, 16 bits each: rows are short enough.
    From here on a row is its keys, from which its logits come back bit by bit: two copies of it would not fit.
    """
    keys = tl.where(valid, _ordered(a), 0xFFFFFFFF)
    low_key = tl.zeros([BLOCK_R], tl.uint32)
    high_key = tl.zeros([BLOCK_R], tl.uint32)
    for step in range(32):
        bit = (tl.full([BLOCK_R], 1, tl.uint32) << (31 - step)).to(tl.uint32)
        low_try, high_try = low_key | bit, high_key | bit
        below = (keys < low_try[:, None]).to(tl.uint32) + ((keys < high_try[:, None]).to(tl.uint32) << 16)
        counts = tl.sum(below, 1)
        low_key = tl.where((counts & 0xFFFF).to(tl.int32) <= low_rank, low_try, low_key)
        high_key = tl.where((counts >> 16).to(tl.int32) <= high_rank, high_try, high_key)
    low = _quantile(keys, low_key, low_rank, low_fraction, T)
    high = _quantile(keys, high_key, high_rank, high_fraction, T)
    a = tl.where(valid, _unordered(keys), 0.0)
    c = tl.minimum(tl.maximum(a, low[:, None]), high[:, None])
    total = tl.sum(tl.where(valid, tl.exp(c - high[:, None]), 0.0), 1)
    # A NaN logit must not end as a finite weight, and the comparisons above would let it.
    poison = tl.sum(a * 0.0, 1)
    lse = high + tl.log(total) + poison

    y, x = token // width, token % width
    neighbors = (tl.minimum(y + 1, height - 1) - tl.maximum(y - 1, 0) + 1) * (
        tl.minimum(x + 1, width - 1) - tl.maximum(x - 1, 0) + 1
    )
    j = tl.arange(0, BLOCK_T)
    for n in range(9):
        tap_y, tap_x = y + n // 3 - 1, x + n % 3 - 1
        inside = (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
        at = tap_y * width + tap_x
        tap = tl.sum(tl.where(j[None, :] == at[:, None], a, 0.0), 1)  # one term: exact
        tap = tl.minimum(tl.maximum(tap, low), high)
        keep = inside & ((tap >= lse - log_tokens) | (lse != lse))
        weight = tl.where(keep, sigma * tl.exp(tap - lse) / neighbors.to(tl.float32), 0.0)
        tl.store(out_ptr + out_row * 9 + n, weight, mask=stored)


@triton.jit
def _neighbor_weights_kernel(
    attention_ptr, out_ptr, rows_total, rows_per_image, first_token, heads, T, height, width,
    stride_image, stride_head, stride_row, sigma, low_rank, low_fraction, high_rank, high_fraction, log_tokens,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Nine weights of BLOCK_R tokens from their attention rows: rows_per_image of each image, from first_token on."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_row = tl.minimum(row, rows_total - 1)
    image, local = (valid_row // rows_per_image).to(tl.int64), valid_row % rows_per_image
    row_at = image * stride_image + local.to(tl.int64) * stride_row
    j = tl.arange(0, BLOCK_T)
    valid = (j < T)[None, :] & (row >= 0)[:, None]
    a = _head_mean(attention_ptr, row_at[:, None] + j[None, :], valid, heads, stride_head)
    token = first_token + local
    _store_weights(
        out_ptr, image * T + token, a, valid, row < rows_total, token, T, height, width,
        sigma, low_rank, low_fraction, high_rank, high_fraction, log_tokens, BLOCK_R, BLOCK_T,
    )  # fmt: skip


@triton.jit
def _neighbor_weights_logits_kernel(
    q_ptr, k_ptr, out_ptr, rows, T, C, stride_q_image, stride_q, stride_k_image, stride_k, stride_out, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[image, i, j] = scale <q_i, k_j>: `rows` queries of each image, all its T keys, rows of stride_out numbers."""
    image = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    products = tile_product(
        q_ptr + image * stride_q_image, k_ptr + image * stride_k_image, tl.minimum(i, rows - 1), tl.minimum(j, T - 1),
        C, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    out_at = (image * rows + i)[:, None] * stride_out + j[None, :]
    tl.store(out_ptr + out_at, products * scale, mask=(i < rows)[:, None] & (j < T)[None, :])


def _row_numbers(tokens: int, sigma: float, low_quantile: float, high_quantile: float) -> tuple[float, ...]:
    """What the kernels want to know of the options: sigma, rank and fraction of both quantiles, log T."""
    low, high = low_quantile * (tokens - 1), high_quantile * (tokens - 1)
    return sigma, int(low), low - int(low), int(high), high - int(high), _natural_log(tokens)


def _launch_rows(
    logits: Tensor, out: Tensor, first_token: int, height: int, width: int, numbers: tuple[float, ...]
) -> None:
    """Weights of the tokens whose logits (images, heads, rows, T or more) are given, into out (images, T, 9)."""
    images, heads, rows, _ = logits.shape
    tokens = height * width
    block_t = triton.next_power_of_2(max(tokens, 32))
    block_r = max(1, min(4, _ROW_NUMBERS // block_t))
    _neighbor_weights_kernel[(triton.cdiv(images * rows, block_r),)](
        logits, out, images * rows, rows, first_token, heads, tokens, height, width,
        logits.stride(0), logits.stride(1), logits.stride(2), *numbers,
        BLOCK_R=block_r, BLOCK_T=block_t, num_warps=max(4, block_r * block_t // _WARP_NUMBERS),
    )  # fmt: skip


def _require_short_rows(name: str, tokens: int) -> None:
    if tokens > _LONGEST_ROW:
        raise ValueError(
            f"{name}: the triton backend takes at most {_LONGEST_ROW} tokens an image, got {tokens}; "
            "backend='reference' takes more"
        )


def neighbor_weights(attention: Tensor, how: Weighting) -> Tensor:
    """Weights (B, T, 9) fp32 of the 3 x 3 neighbours of each token; attention (B, heads, T, T) or (B, T, T)."""
    require_supported(attention=attention)
    attention = (attention[:, None] if attention.ndim == 3 else attention).contiguous()
    batch, _, tokens, _ = attention.shape
    _require_short_rows("attention", tokens)
    out = torch.empty((batch, tokens, 9), dtype=torch.float32, device=attention.device)
    if batch:
        numbers = _row_numbers(tokens, how.sigma, how.low_quantile, how.high_quantile)
        with on_device(attention):
            _launch_rows(attention, out, 0, how.height, how.width, numbers)
    return out


def neighbor_weights_qk(queries: Tensor, keys: Tensor, scale: float, how: Weighting) -> Tensor:
    """Weights (B, T, 9) fp32 from queries and keys (B, heads, T, d); logits scale * mean over heads of <q, k>."""
    require_supported(queries=queries, keys=keys)
    batch, heads, tokens, _ = queries.shape
    _require_short_rows("queries", tokens)
    out = torch.empty((batch, tokens, 9), dtype=torch.float32, device=queries.device)
    if not batch:
        return out
    queries, keys = _all_heads(queries, keys)
    numbers = _row_numbers(tokens, how.sigma, how.low_quantile, how.high_quantile)
    with on_device(queries):
        _through_workspace(queries, keys, out, scale / heads, how.height, how.width, numbers)
    return out


def _all_heads(*operands: Tensor) -> list[Tensor]:
    """(B, heads, T, d) -> (B, T, heads * d) of one dtype, in whole steps; no copy of views of one qkv projection."""
    rows = [x.transpose(1, 2).flatten(2) for x in operands]
    if len({x.dtype for x in rows}) > 1:
        rows = same_dtype(*rows)
    rows = [x if x.stride(2) == 1 else x.contiguous() for x in rows]
    step = _LOGIT_TILES[dtype_class(rows[0].dtype)]["BLOCK_K"]
    return [padded_rows(x, step) for x in rows]


def _through_workspace(
    queries: Tensor, keys: Tensor, out: Tensor, scale: float, height: int, width: int, numbers: tuple[float, ...]
) -> None:
    """Logits of some images, or of some rows of one, at a time: no more than _WORKSPACE_BYTES of them."""
    batch, tokens, depth = queries.shape
    config = _LOGIT_TILES[dtype_class(queries.dtype)]
    stride = triton.cdiv(tokens, 16) * 16  # every row of the workspace can be read 16 bytes at a time
    rows = min(tokens, max(1, _WORKSPACE_BYTES // (4 * stride)))
    images = min(batch, _LARGEST_GRID, max(1, _WORKSPACE_BYTES // (4 * stride * rows)))
    workspace = torch.empty(images * rows * stride, dtype=torch.float32, device=queries.device)
    for first_image in range(0, batch, images):
        some = slice(first_image, first_image + images)
        q, k, weights = queries[some], keys[some], out[some]
        for first in range(0, tokens, rows):
            q_rows = q[:, first : first + rows]
            count = q_rows.shape[1]
            logits = workspace[: len(q) * count * stride].view(len(q), 1, count, stride)
            grid = (triton.cdiv(tokens, config["BLOCK_N"]), triton.cdiv(count, config["BLOCK_M"]), len(q))
            _neighbor_weights_logits_kernel[grid](
                q_rows, k, logits, count, tokens, depth, *q_rows.stride()[:2], *k.stride()[:2], stride, scale,
                PRECISION=precision(q.dtype), **config,
            )  # fmt: skip
            _launch_rows(logits, weights, first, height, width, numbers)


def _natural_log(tokens: int) -> float:
    """log T as the fp32 number that the reference compares with."""
    return torch.log(torch.tensor(float(tokens), dtype=torch.float32)).item()


@triton.jit
def _neighbor_mix_kernel(
    code_ptr, weights_ptr, out_ptr, T, D, height, width,
    TRANSPOSED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = sum_n w_i[n] code[i + n]; TRANSPOSED: out_j = sum_n w_{j-n}[n] code[j - n], the gradient to code."""
    panels, pieces = tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D)
    part = tl.program_id(0) // panels
    image = (part // pieces).to(tl.int64)
    token = tl.program_id(0) % panels * BLOCK_T + tl.arange(0, BLOCK_T)
    d = part % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    y, x = token // width, token % width
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for n in tl.static_range(9):
        dy = (1 - n // 3) if TRANSPOSED else (n // 3 - 1)
        dx = (1 - n % 3) if TRANSPOSED else (n % 3 - 1)
        inside = (token < T) & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        neighbor = (image * T + token + dy * width + dx).to(tl.int64)
        weight_row = neighbor if TRANSPOSED else image * T + token
        w = tl.load(weights_ptr + weight_row * 9 + n, mask=inside, other=0.0).to(tl.float32)
        code = tl.load(
            code_ptr + neighbor[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
        )
        acc += w[:, None] * code.to(tl.float32)
    out_at = (image * T + token)[:, None] * D + d[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=(token < T)[:, None] & (d < D)[None, :])


@triton.jit
def _neighbor_mix_grad_weights_kernel(
    grad_ptr, code_ptr, out_ptr, T, D, height, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out_i[n] = <g_i, code[i + n]>."""
    panels = tl.cdiv(T, BLOCK_T)
    image = (tl.program_id(0) // panels).to(tl.int64)
    token = tl.program_id(0) % panels * BLOCK_T + tl.arange(0, BLOCK_T)
    y, x = token // width, token % width
    row = image * T + token
    for n in tl.static_range(9):
        dy = n // 3 - 1
        dx = n % 3 - 1
        inside = (token < T) & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        dots = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = inside[:, None] & (d < D)[None, :]
            g = tl.load(grad_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            code = tl.load(code_ptr + (row + dy * width + dx)[:, None] * D + d[None, :], mask=mask, other=0.0)
            dots += g * code.to(tl.float32)
        tl.store(out_ptr + row * 9 + n, tl.sum(dots, 1).to(out_ptr.dtype.element_ty), mask=token < T)


def _mix(code: Tensor, weights: Tensor, height: int, width: int, transposed: bool) -> Tensor:
    out = torch.empty_like(code)
    batch, tokens, d = code.shape
    if out.numel():
        panels, pieces = triton.cdiv(tokens, _MIX_TOKENS), triton.cdiv(d, _MIX_CHANNELS)
        with on_device(code):
            _neighbor_mix_kernel[(batch * pieces * panels,)](  # the other two axes of a grid end at 65,535
                code, weights, out, tokens, d, height, width,
                TRANSPOSED=transposed, BLOCK_T=_MIX_TOKENS, BLOCK_D=_MIX_CHANNELS, num_warps=_MIX_WARPS,
            )  # fmt: skip
    return out


def neighbor_mix(code: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """out_i = sum_n w_i[n] code[i + n]; code (B, T, D), weights (B, T, 9); in code's dtype, fp32 arithmetic."""
    require_supported(code=code, weights=weights)
    return _mix(code.contiguous(), weights.contiguous(), height, width, transposed=False)


def neighbor_mix_grad(
    grad_out: Tensor, code: Tensor, weights: Tensor, height: int, width: int, need_code: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """dL/dcode_j = sum_n w_{j-n}[n] g_{j-n}, a gather without atomics, and dL/dw_i[n] = <g_i, code_{i+n}>."""
    require_supported(grad_out=grad_out, code=code, weights=weights)
    grad_out = grad_out.contiguous()
    grad_code, grad_weights = code.new_empty(0), weights.new_empty(0)
    if need_code:
        grad_code = _mix(grad_out, weights.contiguous(), height, width, transposed=True).to(code.dtype)
    if need_weights:
        batch, tokens, d = code.shape
        grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
        if code.numel():
            with on_device(code):
                _neighbor_mix_grad_weights_kernel[(batch * triton.cdiv(tokens, _MIX_TOKENS),)](
                    grad_out, code.contiguous(), grad_weights, tokens, d, height, width,
                    BLOCK_T=_MIX_TOKENS, BLOCK_D=_MIX_CHANNELS, num_warps=_MIX_WARPS,
                )  # fmt: skip
    return grad_code, grad_weights
