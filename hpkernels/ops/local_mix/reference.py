"""Local hidden positives in plain torch: neighbour weights from attention, and the nine-tap mixing."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.local_mix.weighting import Weighting

_LOWEST = -1e30  # stands for -inf logits (the log of a softmax that underflowed), so that quantiles stay numbers
OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]  # slot n = 3 (dy + 1) + (dx + 1)


def neighbor_table(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token and slot the neighbour's index (0 off the grid) and whether it lies on the grid; both (T, 9)."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    indices, inside = [], []
    for dy, dx in OFFSETS:
        yy, xx = (y + dy)[:, None].expand(height, width), (x + dx)[None].expand(height, width)
        ok = (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
        indices.append(torch.where(ok, yy * width + xx, 0).flatten())
        inside.append(ok.flatten())
    return torch.stack(indices, 1), torch.stack(inside, 1)


def _quantile(rows: Tensor, q: float) -> Tensor:
    """Linear-interpolation quantile of the last axis, without torch.quantile's limit on the input size."""
    position = q * (rows.shape[-1] - 1)
    low = int(position)
    high = min(low + 1, rows.shape[-1] - 1)
    ordered = rows.sort(-1).values
    return torch.lerp(ordered[..., low], ordered[..., high], position - low)


def _whole_rows(a: Tensor) -> Tensor:
    """a; a row with a number that is not finite, as after an overflow, is NaN throughout."""
    return a + (0 * a).sum(-1, keepdim=True)


def neighbor_weights(attention: Tensor, how: Weighting) -> Tensor:
    """w (B, T, 9): softmax of the clamped mean-head logits times sigma, kept where not below the row mean, over |N(i)|.

    c_ij = clamp(a_ij, q_low(a_i), q_high(a_i)); p = softmax(c); the row mean of p is 1/T, so tap j is kept iff
    T e_ij >= sum_j' e_ij', e_ij = exp(c_ij - q_high(a_i)) (Hidden Positives, CVPR 2023, section 3.3). No logarithm of
    either side is taken: where all c_ij are equal both sides are T, and every tap is kept.
    """
    a = (attention if attention.dtype == torch.float64 else attention.float()).clamp_min(_LOWEST)
    if a.ndim == 4:
        a = a.mean(1)
    a = _whole_rows(a)
    index, inside = neighbor_table(how.height, how.width, a.device)
    low, high = _quantile(a, how.low_quantile)[..., None], _quantile(a, how.high_quantile)[..., None]
    e = torch.exp(torch.minimum(torch.maximum(a, low), high) - high)
    total = e.sum(-1, keepdim=True)
    taps = e.gather(2, index.expand(a.shape[0], -1, -1))
    keep = inside & ~(taps * (how.height * how.width) < total)
    return torch.where(keep, how.sigma * taps / total, 0.0) / inside.sum(1, keepdim=True)


def neighbor_weights_qk(queries: Tensor, keys: Tensor, scale: float, how: Weighting) -> Tensor:
    """`neighbor_weights` of a_ij = scale mean_h <q_hi, k_hj>, one image's (T, T) at a time.

    The mean over the heads is one product of the vectors of all heads: a = (scale / heads) Q K^T, depth heads * d.
    """
    dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
    batch, heads, tokens, _ = queries.shape
    weights = torch.empty((batch, tokens, 9), dtype=dtype, device=queries.device)
    for image in range(batch):
        q, k = (x[image].to(dtype).transpose(0, 1).flatten(1) for x in (queries, keys))
        with torch.autocast(queries.device.type, enabled=False):
            a = _whole_rows((scale / heads) * (q @ k.T))
        weights[image] = neighbor_weights(a[None], how)[0]
    return weights


def neighbor_mix(code: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """out_i = sum_n w_i[n] code[i + n]; code (B, T, D), weights (B, T, 9)."""
    dtype = torch.float64 if torch.float64 in (code.dtype, weights.dtype) else torch.float32
    index, inside = neighbor_table(height, width, code.device)
    source, w = code.to(dtype), weights.to(dtype) * inside
    mixed = sum(w[:, :, n, None] * source[:, index[:, n]] for n in range(9))
    return mixed.to(code.dtype)


def neighbor_mix_grad(
    grad_out: Tensor, code: Tensor, weights: Tensor, height: int, width: int, need_code: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """dL/dcode_j = sum_n w_{j-n}[n] g_{j-n} (a gather: no atomics) and dL/dw_i[n] = <g_i, code_{i+n}>."""
    dtype = torch.float64 if torch.float64 in (code.dtype, weights.dtype) else torch.float32
    index, inside = neighbor_table(height, width, code.device)
    g, source, w = grad_out.to(dtype), code.to(dtype), weights.to(dtype)
    grad_code, grad_weights = code.new_empty(0), weights.new_empty(0)
    if need_code:  # the neighbour at slot 8 - n sees this token at its slot n
        back = [8 - n for n in range(9)]
        terms = (w[:, index[:, m], n, None] * inside[:, m, None] * g[:, index[:, m]] for n, m in enumerate(back))
        grad_code = sum(terms).to(code.dtype)
    if need_weights:
        dots = [(g * source[:, index[:, n]]).sum(-1) * inside[:, n] for n in range(9)]
        grad_weights = torch.stack(dots, -1).to(weights.dtype)
    return grad_code, grad_weights
