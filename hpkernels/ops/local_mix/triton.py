"""Local hidden positives in Triton: neighbour weights from attention, or from queries and keys, and nine-tap mixing."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.gpu import padded_rows
from hpkernels.ops.common.triton import on_device, precision, require_supported, same_dtype, tile_product
from hpkernels.ops.local_mix.weighting import Weighting
from hpkernels.tuning import dtype_class

_LOWEST = tl.constexpr(-1e30)  # stands for logits of -inf, so that quantiles stay numbers
_INFINITY = tl.constexpr(float("inf"))
_WARP_NUMBERS = 1024  # logits that a warp holds
_LONGEST_ROW = 32 * _WARP_NUMBERS  # of as many warps as a program can have
_PIVOTS = tl.constexpr(12)  # that are tried before looking at what an interval holds: mostly enough, see README.md
_MIX_TOKENS, _MIX_CHANNELS, _MIX_WARPS = 32, 64, 4

# From queries and keys: tiles of logits into a workspace of at most _WORKSPACE_BYTES, or of one row.
_LOGIT_TILES = {
    "half": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "single": dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=2),
}
_WORKSPACE_BYTES = 64 << 20
_LARGEST_GRID = 65535  # programs along an axis that is not the first


@triton.jit
def _head_sum(base_ptr, offsets, mask, heads, stride_head):
    """Sum over the heads of logits at `offsets`, in fp32, always in the order of the heads."""
    total = tl.zeros(offsets.shape, tl.float32)
    for _ in range(heads):
        logits = tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.maximum(logits, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
        base_ptr += stride_head  # added head by head: head * stride_head may leave int32
    return total


@triton.jit
def _pivot(rank, low, high, before, reached):
    """Within an interval that holds the values of ranks before to reached - 1: half-way between its middle and where
    `rank` would lie if they were spread evenly. Above `low` where the ends differ, not above `high`."""
    share = 0.25 + 0.5 * (rank + 1 - before) / tl.maximum(reached - before, 1.0)
    pivot = tl.minimum(tl.maximum((1.0 - share) * low + share * high, low), high)
    return tl.where(pivot > low, pivot, high)


@triton.jit
def _narrowed(pivot, below, rank, low, high, end, before, reached):
    """The interval of ranks `rank` and rank + 1, once `below` values are known to lie below a pivot in it.

    With rank + 1 values below it the pivot lies between the two, and becomes both ends.
    """
    above, beneath = below <= rank + 1, below > rank
    low, before = tl.where(above, pivot, low), tl.where(above, below, before)
    high, end, reached = (
        tl.where(beneath, pivot, high),
        tl.where(beneath, pivot, end),
        tl.where(beneath, below, reached),
    )
    return low, high, end, before, reached


@triton.jit
def _ends(a, low, end):
    """The least value from `low` on and the largest below `end`; and low and high, moved there if they lie outside."""
    first, last = tl.min(tl.where(a >= low, a, _INFINITY)), tl.max(tl.where(a < end, a, -_INFINITY))
    return first, last, tl.minimum(first, end), tl.maximum(last, low)


@triton.jit
def _quantile(first, last, fraction):
    """torch.quantile's linear interpolation between two order statistics, whichever comes first."""
    low, high = tl.minimum(first, last), tl.maximum(first, last)
    return tl.where(fraction < 0.5, low + fraction * (high - low), high - (high - low) * (1.0 - fraction))


@triton.jit
def _quantiles(a, count, smallest, largest, low_rank, low_fraction, high_rank, high_fraction):
    """Two quantiles of `count` finite values, which lie from smallest to largest; what else is in `a` is infinite.

    Each is interpolated between the order statistics of its rank and the next. The range of the row is narrowed down
    for both quantiles at a time, until a pivot lies between the two statistics or they are alone in their interval.
    Neither comes where many values are equal: then the interval shrinks to the values that it holds, and is left if
    these are one. Counts are fp32, and exact.
    """
    low_rank, high_rank = low_rank.to(tl.float32), high_rank.to(tl.float32)
    low_l, high_l, end_l, before_l, reached_l = smallest, largest, _INFINITY, 0.0, count
    low_h, high_h, end_h, before_h, reached_h = smallest, largest, _INFINITY, 0.0, count
    first_l, last_l, first_h, last_h = smallest, smallest, smallest, smallest
    searching = True
    while searching:
        step = 0
        while (step < _PIVOTS) & ((reached_l - before_l > 2) | (reached_h - before_h > 2)):
            pivot_l = _pivot(low_rank, low_l, high_l, before_l, reached_l)
            pivot_h = _pivot(high_rank, low_h, high_h, before_h, reached_h)
            below_l, below_h = tl.sum(tl.where(a < pivot_l, 1.0, 0.0)), tl.sum(tl.where(a < pivot_h, 1.0, 0.0))
            low_l, high_l, end_l, before_l, reached_l = _narrowed(
                pivot_l, below_l, low_rank, low_l, high_l, end_l, before_l, reached_l
            )
            low_h, high_h, end_h, before_h, reached_h = _narrowed(
                pivot_h, below_h, high_rank, low_h, high_h, end_h, before_h, reached_h
            )
            step += 1
        first_l, last_l, low_l, high_l = _ends(a, low_l, end_l)
        first_h, last_h, low_h, high_h = _ends(a, low_h, end_h)
        searching = ((reached_l - before_l > 2) & (low_l < high_l)) | ((reached_h - before_h > 2) & (low_h < high_h))
    return _quantile(first_l, last_l, low_fraction), _quantile(first_h, last_h, high_fraction)


@triton.jit
def _neighbor_weights_kernel(
    attention_ptr, out_ptr, rows, first_token, heads, T, height, width, stride_image, stride_head, stride_row,
    exponent_scale, sigma, low_rank, low_fraction, high_rank, high_fraction, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Nine weights of one token from its row of logits: `rows` tokens of each image, from first_token on.

    The row is the sum over the heads; `exponent_scale`, log2(e) / heads, makes its mean's exponentials. Up to
    stride_row numbers of a row are read, all of which it has to have.
    """
    image, local = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    row_ptr = attention_ptr + image * stride_image + local.to(tl.int64) * stride_row
    token = first_token + local
    y, x = token // width, token % width
    n = tl.arange(0, 16)
    tap_y, tap_x = y + n // 3 - 1, x + n % 3 - 1
    inside = (n < 9) & (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
    taps = _head_sum(row_ptr, tl.minimum(tap_y * width + tap_x, T - 1), inside, heads, stride_head)

    j = tl.arange(0, BLOCK_T)
    logits = _head_sum(row_ptr, j, j < stride_row, heads, stride_head)
    a = tl.where(j < T, logits, _INFINITY)  # below no pivot
    logits = tl.where(j < T, logits, 0.0)
    poison = tl.sum(logits * 0.0)  # NaN where a logit is NaN or infinite
    low, high = _quantiles(
        a, tl.where(poison == 0.0, T, 0).to(tl.float32), tl.min(logits), tl.max(logits),
        low_rank, low_fraction, high_rank, high_fraction,
    )  # fmt: skip
    clamped = tl.where(a < _INFINITY, tl.minimum(tl.maximum(a, low), high), -_INFINITY)
    total = tl.sum(tl.exp2((clamped - high) * exponent_scale)) + poison
    weights = tl.exp2((tl.minimum(tl.maximum(taps, low), high) - high) * exponent_scale)
    neighbors = tl.sum(inside.to(tl.int32))
    dropped = weights * T < total
    weights = tl.where(inside & ~dropped, sigma * weights / (total * neighbors), 0.0)
    tl.store(out_ptr + (image * T + token) * 9 + n, weights, mask=n < 9)


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


def _row_numbers(heads: int, how: Weighting) -> tuple[float, ...]:
    """What the row kernel wants to know of the options: scale of the exponents, sigma, rank and fraction of both
    quantiles; the rank has one above it."""
    tokens = how.height * how.width
    numbers = [1 / (heads * math.log(2)), how.sigma]
    for quantile in (how.low_quantile, how.high_quantile):
        position = quantile * (tokens - 1)
        rank = max(0, min(int(position), tokens - 2))
        numbers += [rank, position - rank]
    return tuple(numbers)


def _launch_rows(logits: Tensor, out: Tensor, first_token: int, how: Weighting) -> None:
    """Weights of the tokens whose logits (images, heads, rows, T or more) are given, into out (images, T, 9)."""
    images, heads, rows, _ = logits.shape
    tokens = how.height * how.width
    block_t = triton.next_power_of_2(max(tokens, 32))
    _neighbor_weights_kernel[(images * rows,)](
        logits, out, rows, first_token, heads, tokens, how.height, how.width, *logits.stride()[:3],
        *_row_numbers(heads, how), BLOCK_T=block_t, num_warps=max(1, block_t // _WARP_NUMBERS),
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
        with on_device(attention):
            _launch_rows(attention, out, 0, how)
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
    with on_device(queries):
        _through_workspace(queries, keys, out, scale / heads, how)
    return out


def _all_heads(*operands: Tensor) -> list[Tensor]:
    """(B, heads, T, d) -> (B, T, heads * d) of one dtype, in whole steps; no copy of views of one qkv projection."""
    rows = [x.transpose(1, 2).flatten(2) for x in operands]
    if len({x.dtype for x in rows}) > 1:
        rows = same_dtype(*rows)
    rows = [x if x.stride(2) == 1 else x.contiguous() for x in rows]
    step = _LOGIT_TILES[dtype_class(rows[0].dtype)]["BLOCK_K"]
    return [padded_rows(x, step) for x in rows]


def _through_workspace(queries: Tensor, keys: Tensor, out: Tensor, scale: float, how: Weighting) -> None:
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
            _launch_rows(logits, weights, first, how)


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
