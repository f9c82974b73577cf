"""neighbor_attention: attention to what is close in position and appearance, through torch's fused attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hpkernels import dispatch
from hpkernels.attention import reference
from hpkernels.common.checks import (
    LARGEST,
    SMALLEST,
    check_float_tensor,
    check_positive,
    describe,
    look_finite,
    look_number,
)
from hpkernels.ops.common.autograd import differentiable_once

_MOST = 1e15  # in size, of queries and keys: their products are numbers
_MULTIPLE = 8  # of channels, as fused attention wants them


def neighbor_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None = None,
    appearance: Tensor | None = None,
    *,
    position_sigma: float | Tensor = 0.2,
    appearance_sigma: float | Tensor = 0.1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with a Gaussian of the distance in position and one in appearance, without N x N numbers.

        a_ij = softmax_j( scale <q_i, k_j> - |p_i - p_j|^2 / (2 s_p^2) - |c_i - c_j|^2 / (2 s_c^2) )
        out_i = sum_j a_ij v_j

    The context-aware embedding of FS^4 (Wang et al., arXiv 2202.11981) as this package reads it; the weights of a
    bilateral filter with learned similarities.

    Args:
        queries, keys: (B, N, d) or (B, heads, N, d), any floating dtype. values: (B, N, d_v) or (B, heads, N, d_v).
        positions, appearance: (B, N, P) and (B, N, C), or (N, P) and (N, C) for all images alike: where a token is and
            what it looks like, in any unit; the same for all heads. None leaves the term out.
        position_sigma, appearance_sigma: s_p and s_c in the units of positions and appearance, > 0: numbers or 0-dim
            tensors, which may be learned and whose sign does not count.
        scale: of the inner products; None means d ** -0.5.
        backend: "reference" for the N x N definition; None and all others are the same torch ops.

    Returns:
        The shape of values, in their dtype, computed in fp32 (fp64 for fp64 in any operand) under autocast, too. The
        gradient flows to all tensors; a second one only with backend="reference". An exponent is off by about
        6e-8 (r / s)^2, r the distance from the mean position (or appearance): keep s above 0.01 r.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected. Non-finite input on the CPU.
    """
    check_float_tensor("queries", queries, ndim=(3, 4))
    for name, x in (("keys", keys), ("values", values)):
        check_float_tensor(name, x, ndim=queries.ndim, like=queries)
    if queries.shape[-1] == 0:
        raise ValueError(f"queries: expected at least one channel, got {describe(queries)}")
    if keys.shape != queries.shape:
        raise ValueError(f"keys: expected the shape of queries, {tuple(queries.shape)}, got {describe(keys)}")
    if values.shape[:-1] != queries.shape[:-1]:
        raise ValueError(f"values: expected shape {(*queries.shape[:-1], 'd_v')}, got {describe(values)}")
    scale = queries.shape[-1] ** -0.5 if scale is None else check_positive("scale", scale)
    terms = []
    if positions is not None:
        terms.append(_check_term("positions", positions, "position_sigma", position_sigma, queries))
    if appearance is not None:
        terms.append(_check_term("appearance", appearance, "appearance_sigma", appearance_sigma, queries))
    tensors = [queries, keys, values, *(x for term in terms for x in term if isinstance(x, Tensor))]
    chosen = dispatch.choose(queries.device, backend, *tensors)
    for name, x, most in (("queries", queries, _MOST), ("keys", keys, _MOST), ("values", values, float("inf"))):
        look_finite(name, x, most)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    q, k, v = (x.to(dtype) if x.ndim == 4 else x.to(dtype)[:, None] for x in (queries, keys, values))
    terms = [(places.to(dtype), sigma.to(dtype) if isinstance(sigma, Tensor) else sigma) for places, sigma in terms]
    if chosen != "reference":
        q, k, v = map(differentiable_once, (q, k, v))
        terms = [
            (differentiable_once(places), differentiable_once(sigma) if isinstance(sigma, Tensor) else sigma)
            for places, sigma in terms
        ]
    with torch.autocast(queries.device.type, enabled=False):
        mix = reference.neighbor_attention if chosen == "reference" else _by_columns
        mixed = mix(q, k, v, terms, scale)
    return (mixed if values.ndim == 4 else mixed[:, 0]).to(values.dtype)


def _by_columns(q: Tensor, k: Tensor, v: Tensor, terms: list[tuple[Tensor, float | Tensor]], scale: float) -> Tensor:
    """|p_i - p_j|^2 = |p_i|^2 - 2 <p_i, p_j> + |p_j|^2, of which softmax_j does not see the first: with u = p / s,

        exponent_ij = <(scale q_i, u_i, 1), (k_j, u_j, -|u_j|^2 / 2)>

    and that is ordinary attention. Centred, as a shift changes no difference and small u lose least to rounding.
    """
    of_queries, of_keys = [scale * q], [k]
    bias = q.new_zeros(())
    for places, sigma in terms:
        scaled = (places - places.detach().mean(1, keepdim=True)) / sigma
        bias = bias - scaled.square().sum(-1, keepdim=True) / 2
        for columns in (of_queries, of_keys):
            columns.append(scaled[:, None].expand(-1, q.shape[1], -1, -1))
    if terms:
        bias = bias[:, None].expand(-1, q.shape[1], -1, -1)
        of_queries.append(torch.ones_like(bias))
        of_keys.append(bias)
    width = max(sum(columns.shape[-1] for columns in of_keys), v.shape[-1])
    width += -width % _MULTIPLE

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1]))

    queries, keys = padded(torch.cat(of_queries, -1)), padded(torch.cat(of_keys, -1))
    return F.scaled_dot_product_attention(queries, keys, padded(v), scale=1.0)[..., : v.shape[-1]]


def _check_term(
    name: str, places: Tensor, sigma_name: str, sigma: float | Tensor, queries: Tensor
) -> tuple[Tensor, float | Tensor]:
    """Places (B, N, columns) and their sigma, such that squares of the distances in sigmas are numbers."""
    sigma, places = _check_sigma(sigma_name, sigma, queries), _check_places(name, places, queries)
    with torch.no_grad():
        distances = (places - places.mean(1, keepdim=True)) / sigma
    look_finite(f"{name} / {sigma_name}, from the mean", distances, LARGEST)
    return places, sigma


def _check_places(name: str, places: Tensor, queries: Tensor) -> Tensor:
    """(B, N, columns)."""
    check_float_tensor(name, places, ndim=(2, 3), like=queries)
    if places.shape[:-1] not in ((queries.shape[0], queries.shape[-2]), (queries.shape[-2],)):
        wanted = f"({queries.shape[0]}, {queries.shape[-2]}, columns) or ({queries.shape[-2]}, columns)"
        raise ValueError(f"{name}: expected {wanted}, got {describe(places)}")
    look_finite(name, places)
    return places if places.ndim == 3 else places.expand(queries.shape[0], -1, -1)


def _check_sigma(name: str, sigma: float | Tensor, queries: Tensor) -> float | Tensor:
    if not isinstance(sigma, Tensor):
        return check_positive(name, sigma)
    if sigma.ndim or not sigma.is_floating_point():
        raise ValueError(f"{name}: expected a number or a 0-dim floating-point tensor, got {describe(sigma)}")
    if sigma.device not in (queries.device, torch.device("cpu")):
        raise ValueError(f"{name}: expected a tensor on {queries.device}, got {describe(sigma)}")
    look_number(name, sigma.abs(), SMALLEST, LARGEST)
    return sigma
