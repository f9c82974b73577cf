"""The weighted average of a contrastive loss in Triton: a program an image, in one fixed order, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops.common.triton import on_device
from hpkernels.ops.pair_average.rows import Rows, Weights

_ROWS = 512  # of an image at a time


@triton.jit
def _row_weights(n_pos_ptr, n_ext_ptr, at, inside, extra, ANCHORS: tl.constexpr):
    """w_i, v_i and the weight in the image's sum, of "pairs" and "anchors"."""
    n_pos = tl.load(n_pos_ptr + at, mask=inside, other=0.0)
    v = tl.minimum(n_pos, 1.0)
    w = v * (n_pos + extra * tl.load(n_ext_ptr + at, mask=inside, other=0.0))
    of_image = w
    if ANCHORS:
        of_image = v
        v = v / tl.where(w == 0.0, 1.0, w)
        w = of_image
    return w, v, of_image


@triton.jit
def _pair_average_kernel(
    lse_ptr, pos_ptr, ext_ptr, n_pos_ptr, n_ext_ptr, extra_ptr, part_ptr, inverse_ptr,
    tokens, n, images, streams, extra, scale,
    ANCHORS: tl.constexpr, SEPARATE: tl.constexpr, EXTRA_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part[b] = the share of image b; inverse[., b] = scale / (its weight, of P and of Q where they are separate)."""
    image = tl.program_id(0)
    if EXTRA_IN_MEMORY:
        extra = tl.load(extra_ptr).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    extra_sums = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    extra_weight = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < tokens
        at = image.to(tl.int64) * tokens + token
        if SEPARATE:
            w = tl.load(n_pos_ptr + at, mask=inside, other=0.0)
            w_extra = tl.load(n_ext_ptr + at, mask=inside, other=0.0)
            weight += w
            extra_weight += w_extra
        else:
            w, v, of_image = _row_weights(n_pos_ptr, n_ext_ptr, at, inside, extra, ANCHORS)
            weight += of_image
        for _ in range(streams):
            lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
            pos = tl.load(pos_ptr + at, mask=inside, other=0.0)
            ext = tl.load(ext_ptr + at, mask=inside, other=0.0)
            if SEPARATE:
                sums += w * lse - pos
                extra_sums += w_extra * lse - ext
            else:
                sums += w * lse - v * (pos + extra * ext)
            at += n
    inverse = scale / tl.maximum(tl.sum(weight, 0), 1.0)
    part = tl.sum(sums, 0) * inverse
    tl.store(inverse_ptr + image, inverse)
    if SEPARATE:
        inverse = scale / tl.maximum(tl.sum(extra_weight, 0), 1.0)
        part += extra * tl.sum(extra_sums, 0) * inverse
        tl.store(inverse_ptr + images + image, inverse)
    tl.store(part_ptr + image, part)


@triton.jit
def _pair_average_grad_kernel(
    grad_ptr, n_pos_ptr, n_ext_ptr, extra_ptr, inverse_ptr, grad_lse_ptr, grad_pos_ptr, grad_ext_ptr,
    tokens, n, images, streams, extra,
    ANCHORS: tl.constexpr, SEPARATE: tl.constexpr, EXTRA_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of lse, pos and ext, for a block of an image's rows in all streams."""
    image = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    at = image.to(tl.int64) * tokens + token
    if EXTRA_IN_MEMORY:
        extra = tl.load(extra_ptr).to(tl.float32)
    grad = tl.load(grad_ptr)
    g = grad * tl.load(inverse_ptr + image)
    if SEPARATE:
        g_extra = grad * extra * tl.load(inverse_ptr + images + image)
        of_lse = g * tl.load(n_pos_ptr + at, mask=inside, other=0.0)
        of_lse += g_extra * tl.load(n_ext_ptr + at, mask=inside, other=0.0)
        of_pos = tl.zeros([BLOCK], tl.float32) - g
        of_ext = tl.zeros([BLOCK], tl.float32) - g_extra
    else:
        w, v, _ = _row_weights(n_pos_ptr, n_ext_ptr, at, inside, extra, ANCHORS)
        of_lse, of_pos, of_ext = g * w, -g * v, -g * v * extra
    for _ in range(streams):
        tl.store(grad_lse_ptr + at, of_lse, mask=inside)
        tl.store(grad_pos_ptr + at, of_pos, mask=inside)
        tl.store(grad_ext_ptr + at, of_ext, mask=inside)
        at += n


def _options(weights: Weights, anything: Tensor) -> tuple[Tensor, float, dict]:
    """lambda as a tensor on the device, if it is one, and as a number; the kernels' options."""
    extra = weights.extra
    in_memory = isinstance(extra, Tensor) and extra.device == anything.device
    number = 0.0 if in_memory else float(extra)  # a number that lies on the host takes no wait
    choices = dict(ANCHORS=weights.weighting == "anchors", SEPARATE=weights.weighting == "separate")
    return extra if in_memory else anything, number, dict(**choices, EXTRA_IN_MEMORY=in_memory, BLOCK=_ROWS)


def pair_average(rows: Rows, weights: Weights, scale: float) -> tuple[Tensor, Tensor]:
    """scale times the average of reference.py, 0-dim, and what its gradient needs of each image."""
    rows = Rows(*[table.contiguous() for table in rows])
    streams, n = rows.lse.shape
    extra, number, options = _options(weights, rows.lse)
    parts = torch.empty(weights.images, dtype=torch.float32, device=rows.lse.device)
    inverses = torch.empty((weights.sums, weights.images), dtype=torch.float32, device=rows.lse.device)
    scale = scale / (streams * weights.all_images)
    with on_device(rows.lse):
        _pair_average_kernel[(weights.images,)](
            *rows, extra, parts, inverses, n // weights.images, n, weights.images, streams, number, scale, **options
        )
    return parts.sum(), inverses


def pair_average_grad(
    grad: Tensor, rows: Rows, weights: Weights, inverses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of lse, pos and ext, each (S, n)."""
    streams, n = rows.lse.shape
    extra, number, options = _options(weights, rows.lse)
    found = tuple(torch.empty((streams, n), dtype=torch.float32, device=rows.lse.device) for _ in range(3))
    tokens = n // weights.images
    if n:
        with on_device(rows.lse):
            _pair_average_grad_kernel[(weights.images, triton.cdiv(tokens, _ROWS))](
                grad, rows.n_pos.contiguous(), rows.n_ext.contiguous(), extra, inverses, *found,
                tokens, n, weights.images, streams, number, **options,
            )  # fmt: skip
    return found
