"""Local hidden positives on `hpkernels._cuda`: neighbour weights from attention or from queries and keys, nine-tap
mixing and its gradient. Arithmetic in fp32; every element has one owner and one order of summation."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import _cuda
from hpkernels.ops.common.cuda import SUFFIX, launch, require_supported, whole_chunks
from hpkernels.ops.common.gpu import common_dtype
from hpkernels.ops.local_mix.weighting import Weighting

_WORKSPACE_BYTES = 64 << 20  # bound of the mean logits alive at a time, but at least one image's
_LARGEST_GRID = 65535  # blocks of a launch in z: images of a product
_LARGEST_ROW = 16384  # tokens: a row of fp32 logits in the shared memory of every GPU from sm_80 on


def neighbor_weights(attention: Tensor, how: Weighting) -> Tensor:
    """Weights (B, T, 9) fp32 of the 3 x 3 neighbours of each token; attention (B, heads, T, T) or (B, T, T)."""
    require_supported(attention=attention)
    _check_tokens("attention", how.height * how.width)
    attention = (attention[:, None] if attention.ndim == 3 else attention).contiguous()
    out = torch.empty(attention.shape[0], how.height * how.width, 9, dtype=torch.float32, device=attention.device)
    _weights(attention, how, out)
    return out


def neighbor_weights_qk(queries: Tensor, keys: Tensor, scale: float, how: Weighting) -> Tensor:
    """`neighbor_weights` of a_ij = scale * mean over the heads of <q_hi, k_hj>; queries, keys (B, heads, T, d).

    With the heads side by side the mean is one product of depth heads * d, made for a few images at a time.
    """
    require_supported(queries=queries, keys=keys)
    batch, heads, tokens, _ = queries.shape
    _check_tokens("queries", tokens)
    dtype = common_dtype(queries, keys)
    queries, keys = (whole_chunks(x.transpose(1, 2).flatten(2).to(dtype)) for x in (queries, keys))
    out = torch.empty(batch, tokens, 9, dtype=torch.float32, device=queries.device)
    stride = -(-tokens // 4) * 4  # rows of the workspace are whole 16-byte chunks
    step = max(1, min(batch, _LARGEST_GRID, _WORKSPACE_BYTES // max(1, 4 * tokens * stride)))
    logits = torch.empty(step, 1, tokens, stride, dtype=torch.float32, device=queries.device)
    for first in range(0, batch, step):
        images = slice(first, first + step)
        q, k = queries[images], keys[images]
        launch(getattr(_cuda, f"mean_logits_{SUFFIX[dtype]}"), q.device, q.data_ptr(), k.data_ptr(), len(q), tokens,
               q.shape[2], stride, scale / heads, logits.data_ptr())  # fmt: skip
        _weights(logits[: len(q)], how, out[images])
    return out


def _weights(attention: Tensor, how: Weighting, out: Tensor) -> None:
    """Writes the weights of logits (B, heads, T, row stride >= T) to out (B, T, 9)."""
    tokens = how.height * how.width
    if out.numel() == 0:
        return
    places = [attention.data_ptr(), *(stride * attention.element_size() for stride in attention.stride()[:3])]
    access = next((size for size in (16, 8) if all(place % size == 0 for place in places)), attention.element_size())
    ranks = (value for quantile in (how.low_quantile, how.high_quantile) for value in _rank(quantile, tokens))
    launch(getattr(_cuda, f"neighbor_weights_{SUFFIX[attention.dtype]}"), attention.device, attention.data_ptr(),
           *attention.shape[:2], how.height, how.width, *attention.stride()[:3], access, how.sigma, *ranks,
           out.data_ptr())  # fmt: skip


def _rank(quantile: float, tokens: int) -> tuple[int, float]:
    """The order statistic below a quantile, and the weight of the next one."""
    position = quantile * (tokens - 1)
    return int(position), position - int(position)


def _check_tokens(name: str, tokens: int) -> None:
    if tokens > _LARGEST_ROW:
        raise ValueError(f"{name}: the cuda backend takes at most {_LARGEST_ROW} tokens an image, got {tokens}")


def neighbor_mix(code: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """out_i = sum_n w_i[n] code[i + n]; code (B, T, D), weights (B, T, 9); in code's dtype, fp32 arithmetic."""
    require_supported(code=code, weights=weights)
    return _mix(code, weights, height, width, transposed=False)


def neighbor_mix_grad(
    grad_out: Tensor, code: Tensor, weights: Tensor, height: int, width: int, need_code: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """dL/dcode_j = sum_n w_{j-n}[n] g_{j-n}, a gather without atomics, and dL/dw_i[n] = <g_i, code_{i+n}>."""
    require_supported(grad_out=grad_out, code=code, weights=weights)
    grad_code, grad_weights = code.new_empty(0), weights.new_empty(0)
    if need_code:
        grad_code = _mix(grad_out, weights, height, width, transposed=True).to(code.dtype)
    if need_weights:
        dots = torch.zeros(weights.shape, dtype=torch.float32, device=weights.device)
        if code.numel():
            dtype = common_dtype(grad_out, code)
            g, source = (whole_chunks(x.to(dtype)) for x in (grad_out, code))
            launch(getattr(_cuda, f"neighbor_mix_grad_weights_{SUFFIX[dtype]}"), g.device, g.data_ptr(),
                   source.data_ptr(), len(g), height, width, g.shape[2], dots.data_ptr())  # fmt: skip
        grad_weights = dots.to(weights.dtype)
    return grad_code, grad_weights


def _mix(code: Tensor, weights: Tensor, height: int, width: int, transposed: bool) -> Tensor:
    depth = code.shape[2]
    code, weights = whole_chunks(code), weights.float().contiguous()
    out = torch.empty_like(code)
    if out.numel():
        launch(getattr(_cuda, f"neighbor_mix_{SUFFIX[code.dtype]}"), code.device, code.data_ptr(), weights.data_ptr(),
               len(code), height, width, code.shape[2], transposed, out.data_ptr())  # fmt: skip
    return out[..., :depth].contiguous()
