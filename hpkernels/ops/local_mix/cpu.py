"""Neighbour weights from attention and 3 x 3 mixing on the CPU: the pointer calls into `hpkernels._cpu`."""

import torch
from torch import Tensor

from hpkernels.ops.common.cpu import kernel, working_dtype
from hpkernels.ops.local_mix.weighting import Weighting


def neighbor_weights(attention: Tensor, how: Weighting) -> Tensor:
    """Weights (B, T, 9) fp32 (fp64 for fp64) of the 3 x 3 neighbours from logits (B, heads, T, T) or (B, T, T)."""
    dtype = working_dtype(attention)
    if attention.ndim == 3:
        attention = attention[:, None]
    attention = attention.to(dtype).contiguous()
    batch, heads, tokens, _ = attention.shape
    weights = torch.empty(batch, tokens, 9, dtype=dtype)
    if weights.numel():
        kernel("neighbor_weights", dtype)(
            attention.data_ptr(), batch, heads, *how, weights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return weights


def neighbor_weights_qk(queries: Tensor, keys: Tensor, scale: float, how: Weighting) -> Tensor:
    """Weights (B, T, 9) fp32 (fp64 for fp64) of queries and keys (B, heads, T, d): logits a panel of rows at a time."""
    dtype = working_dtype(queries, keys)
    batch, heads = queries.shape[:2]
    queries, keys = (_all_heads(x).to(dtype) for x in (queries, keys))
    weights = torch.empty(batch, how.height * how.width, 9, dtype=dtype)
    if weights.numel():
        kernel("neighbor_weights_qk", dtype)(
            queries.data_ptr(), *queries.stride()[:2], keys.data_ptr(), *keys.stride()[:2], batch, queries.shape[2],
            how.height, how.width, scale / heads, *how[2:], weights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return weights


def _all_heads(x: Tensor) -> Tensor:
    """(B, heads, T, d) -> (B, T, heads * d), contiguous along the last axis; no copy of views of a qkv projection."""
    x = x.transpose(1, 2).flatten(2)
    return x if x.stride(2) == 1 else x.contiguous()


def neighbor_mix(code: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """out_i = sum_n weights_i[n] code[i + n]: (B, T, D) in code's dtype."""
    dtype = working_dtype(code, weights)
    source, taps = code.to(dtype).contiguous(), weights.to(dtype).contiguous()
    out = torch.empty_like(source)
    if out.numel():
        kernel("neighbor_mix", dtype)(
            source.data_ptr(), taps.data_ptr(), code.shape[0], height, width, code.shape[2],
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out.to(code.dtype)


def neighbor_mix_grad(
    grad_out: Tensor, code: Tensor, weights: Tensor, height: int, width: int, need_code: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `neighbor_mix` with respect to code and weights, in their dtypes; empty where not needed."""
    dtype = working_dtype(code, weights)
    source, taps, grad_out = (t.to(dtype).contiguous() for t in (code, weights, grad_out))
    grad_code = torch.empty(source.shape if need_code else (0,), dtype=dtype)
    grad_weights = torch.zeros(taps.shape if need_weights else (0,), dtype=dtype)
    if source.numel() and (need_code or need_weights):
        kernel("neighbor_mix_grad", dtype)(
            grad_out.data_ptr(), source.data_ptr(), taps.data_ptr(), code.shape[0], height, width, code.shape[2],
            grad_code.data_ptr() if need_code else 0, grad_weights.data_ptr() if need_weights else 0,
            torch.get_num_threads(),
        )  # fmt: skip
    return grad_code.to(code.dtype), grad_weights.to(weights.dtype)
