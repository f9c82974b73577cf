"""Local hidden positives in Triton: neighbour weights from attention rows, nine-tap mixing and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops._triton import on_device, require_supported

_LOWEST = tl.constexpr(-1e30)  # stands for logits of -inf, so that quantiles stay numbers
_ROW_NUMBERS = 8192  # logits a program holds; one warp a row for rows of up to 2,048
_MIX_TOKENS, _MIX_CHANNELS, _MIX_WARPS = 32, 64, 4


@triton.jit
def _head_mean(base_ptr, offsets, mask, heads, stride_head):
    """Mean over the heads of logits at `offsets`, in fp32, always in the order of the heads."""
    total = tl.zeros(offsets.shape, tl.float32)
    for head in range(heads):
        logits = tl.load(base_ptr + head * stride_head + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.maximum(logits, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
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
def _quantile(keys, valid, statistic, rank, fraction, T):
    """Linear interpolation between order statistics rank and rank + 1, given the key of the first."""
    count = tl.sum((valid & (keys <= statistic[:, None])).to(tl.int32), 1)
    above = tl.where(valid & (keys > statistic[:, None]), keys ^ 0x80000000, 0x7FFFFFFF)
    # The minimum is taken over signed numbers of the same order.
    least_above = tl.min(above.to(tl.int32, bitcast=True), 1).to(tl.uint32, bitcast=True) ^ 0x80000000
    following = tl.where((count > rank + 1) | (rank + 1 >= T), statistic, least_above)
    a, b = _unordered(statistic), _unordered(following)
    return tl.where(fraction < 0.5, a + fraction * (b - a), b - (b - a) * (1.0 - fraction))


@triton.jit
def _neighbor_weights_kernel(
    attention_ptr, out_ptr, rows_total, heads, T, height, width, stride_image, stride_head, stride_row,
    sigma, low_rank, low_fraction, high_rank, high_fraction, log_tokens,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Nine weights of BLOCK_R tokens from their attention rows.

    The two quantiles come from exact order statistics, found bit by bit: the largest key v with at most `rank` keys
    below it is the statistic of that rank.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_row = tl.minimum(row, rows_total - 1)
    image, token = valid_row // T, valid_row % T
    row_at = image.to(tl.int64) * stride_image + token.to(tl.int64) * stride_row
    j = tl.arange(0, BLOCK_T)
    valid = (j < T)[None, :] & (row >= 0)[:, None]
    a = _head_mean(attention_ptr, row_at[:, None] + j[None, :], valid, heads, stride_head)
    keys = tl.where(valid, _ordered(a), 0xFFFFFFFF)
    low_key = tl.zeros([BLOCK_R], tl.uint32)
    high_key = tl.zeros([BLOCK_R], tl.uint32)
    for step in range(32):
        bit = (tl.full([BLOCK_R], 1, tl.uint32) << (31 - step)).to(tl.uint32)
        low_try, high_try = low_key | bit, high_key | bit
        below_low = tl.sum((keys < low_try[:, None]).to(tl.int32), 1)
        below_high = tl.sum((keys < high_try[:, None]).to(tl.int32), 1)
        low_key = tl.where(below_low <= low_rank, low_try, low_key)
        high_key = tl.where(below_high <= high_rank, high_try, high_key)
    low = _quantile(keys, valid, low_key, low_rank, low_fraction, T)
    high = _quantile(keys, valid, high_key, high_rank, high_fraction, T)
    c = tl.minimum(tl.maximum(a, low[:, None]), high[:, None])
    total = tl.sum(tl.where(valid, tl.exp(c - high[:, None]), 0.0), 1)
    # A NaN logit must not end as a finite weight, and the comparisons above would let it.
    poison = tl.sum(tl.where(valid, a, 0.0) * 0.0, 1)
    lse = high + tl.log(total) + poison

    y, x = token // width, token % width
    neighbors = (tl.minimum(y + 1, height - 1) - tl.maximum(y - 1, 0) + 1) * (
        tl.minimum(x + 1, width - 1) - tl.maximum(x - 1, 0) + 1
    )
    n = tl.arange(0, 16)
    tap_y, tap_x = y[:, None] + (n // 3 - 1)[None, :], x[:, None] + (n % 3 - 1)[None, :]
    inside = (n < 9)[None, :] & (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
    tap = _head_mean(attention_ptr, row_at[:, None] + tap_y * width + tap_x, inside, heads, stride_head)
    tap = tl.minimum(tl.maximum(tap, low[:, None]), high[:, None])
    keep = inside & ((tap >= lse[:, None] - log_tokens) | (lse != lse)[:, None])
    weight = tl.where(keep, sigma * tl.exp(tap - lse[:, None]) / neighbors.to(tl.float32)[:, None], 0.0)
    out_at = row.to(tl.int64)[:, None] * 9 + n[None, :]
    tl.store(out_ptr + out_at, weight, mask=(row < rows_total)[:, None] & (n < 9)[None, :])


def neighbor_weights(
    attention: Tensor, height: int, width: int, sigma: float, low_quantile: float, high_quantile: float
) -> Tensor:
    """Weights (B, T, 9) fp32 of the 3 x 3 neighbours of each token; attention (B, heads, T, T) or (B, T, T)."""
    require_supported(attention=attention)
    attention = (attention[:, None] if attention.ndim == 3 else attention).contiguous()
    batch, heads, tokens, _ = attention.shape
    out = torch.empty((batch, tokens, 9), dtype=torch.float32, device=attention.device)
    block_t = triton.next_power_of_2(max(tokens, 32))
    block_r = max(1, min(4, _ROW_NUMBERS // block_t))
    low, high = low_quantile * (tokens - 1), high_quantile * (tokens - 1)
    if batch:
        with on_device(attention):
            _neighbor_weights_kernel[(triton.cdiv(batch * tokens, block_r),)](
                attention, out, batch * tokens, heads, tokens, height, width,
                attention.stride(0), attention.stride(1), attention.stride(2),
                sigma, int(low), low - int(low), int(high), high - int(high), _natural_log(tokens),
                BLOCK_R=block_r, BLOCK_T=block_t, num_warps=4,
            )  # fmt: skip
    return out


def _natural_log(tokens: int) -> float:
    """log T as the fp32 number that the reference compares with."""
    return torch.log(torch.tensor(float(tokens), dtype=torch.float32)).item()


@triton.jit
def _neighbor_mix_kernel(
    code_ptr, weights_ptr, out_ptr, T, D, height, width,
    TRANSPOSED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = sum_n w_i[n] code[i + n]; TRANSPOSED: out_j = sum_n w_{j-n}[n] code[j - n], the gradient to code."""
    image = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
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
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
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
        grid = (triton.cdiv(tokens, _MIX_TOKENS), triton.cdiv(d, _MIX_CHANNELS), batch)
        with on_device(code):
            _neighbor_mix_kernel[grid](
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
                _neighbor_mix_grad_weights_kernel[(triton.cdiv(tokens, _MIX_TOKENS), batch)](
                    grad_out, code.contiguous(), grad_weights, tokens, d, height, width,
                    BLOCK_T=_MIX_TOKENS, BLOCK_D=_MIX_CHANNELS, num_warps=_MIX_WARPS,
                )  # fmt: skip
    return grad_code, grad_weights
