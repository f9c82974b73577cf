"""local_mix, neighbor_weights, neighbor_weights_qk, neighbor_mix: 3 x 3 mixing of codes, weights from attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import check_float_tensor, check_int, check_positive, check_rate, describe
from hpkernels.ops.local_mix import op
from hpkernels.ops.local_mix.weighting import Weighting

SIGMA = 28.0  # the published constant: the square root of the number of tokens of its 28 x 28 grid


def local_mix(
    code: Tensor,
    attention: Tensor | tuple[Tensor, Tensor],
    grid: tuple[int, int],
    *,
    sigma: float | None = None,
    low_quantile: float = 0.1,
    high_quantile: float = 0.9,
    backend: str | None = None,
) -> Tensor:
    """Mix each patch code with its 3 x 3 neighbours, weighted by attention (Hidden Positives, CVPR 2023).

    Args:
        code: (B, T, D) or (B, D, H, W). The gradient flows to it.
        attention: last-block LOGITS, (B, heads, T, T) or (B, T, T), prefix tokens removed. A constant added to a row
            changes nothing, so from a softmaxed map pass `attention.float().log()`. Or the pair (queries, keys) that
            makes them, each (B, heads, T, d), as in `neighbor_weights_qk`. No gradient.
        grid: (H, W), H * W = T.
        sigma: factor of the weights; None means 28, the published constant.
        low_quantile, high_quantile: each row of logits is clamped to this range first.

    Returns:
        The mixed code, same shape and dtype as `code`.
    """
    check_float_tensor("code", code, ndim=(3, 4))
    height, width = _check_grid(grid)
    if code.ndim == 4 and tuple(code.shape[2:]) != (height, width):
        raise ValueError(f"code: expected (B, D, {height}, {width}) for grid {tuple(grid)}, got {describe(code)}")
    options: dict[str, Any] = dict(sigma=sigma, low_quantile=low_quantile, high_quantile=high_quantile, backend=backend)
    if isinstance(attention, (tuple, list)):
        if len(attention) != 2:
            raise ValueError(f"attention: expected logits or a pair (queries, keys), got {len(attention)} entries")
        _check_images(attention[0], code)
        weights = neighbor_weights_qk(*attention, grid, **options)
    else:
        _check_images(attention, code)
        weights = neighbor_weights(attention, grid, **options)
    if code.ndim == 3:
        return neighbor_mix(code, weights, grid, backend=backend)
    rows = code.flatten(2).transpose(1, 2)
    return neighbor_mix(rows, weights, grid, backend=backend).transpose(1, 2).reshape(code.shape)


def neighbor_weights(
    attention: Tensor,
    grid: tuple[int, int],
    *,
    sigma: float | None = None,
    low_quantile: float = 0.1,
    high_quantile: float = 0.9,
    backend: str | None = None,
) -> Tensor:
    """Weights of the 3 x 3 neighbours (self included) of each token, (B, T, 9) fp32 (fp64 for fp64).

    Slot n = 3 (dy + 1) + (dx + 1); taps off the grid, and taps whose softmax is below its row mean, are 0; the division
    by the number of neighbours on the grid (4, 6 or 9) is included. Arguments as in `local_mix`. No gradient.
    """
    height, width = _check_grid(grid)
    check_float_tensor("attention", attention, ndim=(3, 4))
    tokens = height * width
    if tuple(attention.shape[-2:]) != (tokens, tokens):
        raise ValueError(
            f"attention: expected (..., {tokens}, {tokens}) for grid {tuple(grid)} (prefix tokens removed), "
            f"got {describe(attention)}"
        )
    if attention.ndim == 4 and attention.shape[1] == 0:
        raise ValueError(f"attention: expected at least one head, got {describe(attention)}")
    how = _check_weighting(height, width, sigma, low_quantile, high_quantile)
    return op.neighbor_weights(attention.detach(), *how, dispatch.choose(attention.device, backend, attention))


def neighbor_weights_qk(
    queries: Tensor,
    keys: Tensor,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    sigma: float | None = None,
    low_quantile: float = 0.1,
    high_quantile: float = 0.9,
    backend: str | None = None,
) -> Tensor:
    """`neighbor_weights` of the logits a_ij = scale * mean over heads of <q_hi, k_hj>, which are never stored.

    Args:
        queries, keys: (B, heads, T, d) of the last block as they enter its product (normalised and rotated where the
            model does so), prefix tokens removed. Their dtypes may differ. Views of one (B, tokens, 3, heads, d)
            projection are read where they lie. No gradient.
        scale: of the logits; None means d ** -0.5.
        grid and the rest: as in `local_mix`.

    Returns:
        (B, T, 9) fp32 (fp64 if an operand is), as `neighbor_weights`.
    """
    height, width = _check_grid(grid)
    check_float_tensor("queries", queries, ndim=4)
    check_float_tensor("keys", keys, ndim=4, like=queries)
    if queries.shape[2] != height * width:
        raise ValueError(
            f"queries: expected (B, heads, {height * width}, d) for grid {tuple(grid)} (prefix tokens removed), "
            f"got {describe(queries)}"
        )
    if queries.shape[1] == 0 or queries.shape[3] == 0:
        raise ValueError(f"queries: expected at least one head and one channel, got {describe(queries)}")
    if keys.shape != queries.shape:
        raise ValueError(f"keys: expected the shape of queries, {tuple(queries.shape)}, got {describe(keys)}")
    scale = queries.shape[3] ** -0.5 if scale is None else check_positive("scale", scale)
    how = _check_weighting(height, width, sigma, low_quantile, high_quantile)
    chosen = dispatch.choose(queries.device, backend, queries, keys)
    return op.neighbor_weights_qk(queries.detach(), keys.detach(), scale, *how, chosen)


def neighbor_mix(code: Tensor, weights: Tensor, grid: tuple[int, int], *, backend: str | None = None) -> Tensor:
    """out_i = sum_n weights_i[n] code[i + n] over the 3 x 3 neighbours of token i on the grid.

    Args:
        code: (B, T, D). weights: (B, T, 9), slots as in `neighbor_weights`; taps off the grid are ignored.
            Gradients flow to both.

    Returns:
        (B, T, D) in code's dtype, accumulated in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite input on the CPU.
    """
    height, width = _check_grid(grid)
    check_float_tensor("code", code, ndim=3)
    check_float_tensor("weights", weights, ndim=3, like=code)
    if code.shape[1] != height * width:
        raise ValueError(f"code: expected {height * width} tokens for grid {tuple(grid)}, got {describe(code)}")
    if tuple(weights.shape) != (code.shape[0], code.shape[1], 9):
        raise ValueError(f"weights: expected shape {(code.shape[0], code.shape[1], 9)}, got {describe(weights)}")
    chosen = dispatch.choose(code.device, backend, code, weights)
    return op.neighbor_mix(code, weights, height, width, chosen)


def _check_grid(grid: object) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != 2:
        raise TypeError(f"grid: expected a pair (height, width), got {grid!r}")
    height, width = (check_int("grid", side) for side in grid)
    if height < 1 or width < 1:
        raise ValueError(f"grid: expected height and width of at least 1, got {tuple(grid)}")
    return height, width


def _check_images(attention: object, code: Tensor) -> None:
    """Raise if the attention is of other images than the code."""
    if not isinstance(attention, Tensor) or attention.is_nested or attention.ndim == 0:
        return  # said by those who read it
    if attention.shape[0] != code.shape[0] or attention.device != code.device:
        expected = f"expected {code.shape[0]} images on {code.device}, as code"
        raise ValueError(f"attention: {expected}, got {describe(attention)}")


def _check_weighting(height: int, width: int, sigma: object, low_quantile: object, high_quantile: object) -> Weighting:
    sigma = SIGMA if sigma is None else check_positive("sigma", sigma)
    low, high = check_rate("low_quantile", low_quantile), check_rate("high_quantile", high_quantile)
    if low > high:
        raise ValueError(f"low_quantile: expected at most high_quantile ({high}), got {low}")
    return Weighting(height, width, sigma, low, high)
