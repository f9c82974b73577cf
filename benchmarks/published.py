"""The published algorithm, for comparison: what its authors' training code does, said again in plain torch.

Image by image, the T x N similarities of that image's patches to the whole batch are formed, compared with both
thresholds, turned into masks stored as floating point numbers, and multiplied with exponentials that autograd keeps
until the backward pass: four T x N tables an image, N^2 numbers each over the batch. Nothing here is made slow on
purpose: products are library products, the thresholds are found in one product, and the random mask is drawn once
a call.

Hidden Positives: Seong et al., CVPR 2023. The numbers agree with `hpkernels` (tests/test_benchmarks.py); where the
published code would give NaN (an image without any positive, a row with an empty denominator) so does this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_positive_loss(
    z: Tensor,
    features: Tensor,
    pool: Tensor,
    *,
    z_local: Tensor,
    head_features: Tensor,
    head_pool: Tensor,
    head_weight: float,
    tokens_per_image: int,
    temperature: float = 0.8,
    base_temperature: float = 0.07,
    negative_rate: float = 0.02,
    negative_mask: Tensor | None = None,
    reweight: bool = True,
    compiled: bool = False,
) -> Tensor:
    """The loss of both streams; arguments as in `hpkernels.hidden_positive_loss`, all of one floating dtype.

    `reweight=True` is its weighting "pairs", False is "anchors". negative_mask: bool (T, N); None draws one on the
    device of z. `compiled` puts the body of the image loop under torch.compile.
    """
    n, tokens, dtype, device = z.shape[0], tokens_per_image, z.dtype, z.device
    streams = [F.normalize(z, dim=1), F.normalize(z_local, dim=1)]
    with torch.no_grad():
        searches = [_with_thresholds(features, pool), _with_thresholds(head_features, head_pool)]
        if negative_mask is None:
            negative_mask = torch.rand(tokens, n, device=device) < negative_rate
        negatives = negative_mask.to(dtype)
        others = torch.ones(tokens, n, dtype=dtype, device=device)
        others[:, :tokens].fill_diagonal_(0)

    total = torch.zeros((), dtype=dtype, device=device)
    body = _compiled(_image_loss) if compiled else _image_loss
    for start in range(0, n, tokens):
        rows = slice(start, start + tokens)
        own = [(x[rows], best[rows]) for x, best in searches]
        loss = body(
            [x[rows] for x in streams], streams, own, searches, negatives, others, head_weight, temperature, reweight
        )
        total = total + loss
        others = others.roll(tokens, 1)
    return total * (temperature / base_temperature) * tokens / (len(streams) * n)


def _image_loss(
    own_streams, streams, own_searches, searches, negatives, others, head_weight, temperature, reweight
) -> Tensor:
    """The loss of one image's rows, summed over the streams."""
    with torch.no_grad():
        positives, head_positives = (
            _mask(*own, *whole) * others for own, whole in zip(own_searches, searches)
        )  # fmt: skip
        denominator = torch.logical_or(positives, negatives).to(others.dtype) * others
        kept = positives.sum(1).nonzero().squeeze(1)
        weight = positives[kept] + head_weight * head_positives[kept]
        weight_sum = weight.sum(1)
    total = torch.zeros((), dtype=others.dtype, device=others.device)
    for own, x in zip(own_streams, streams):
        log_prob = _log_prob(own, x, denominator, temperature)
        loss = -(weight * log_prob[kept]).sum(1) / weight_sum
        if reweight:
            loss = loss * (weight_sum / weight_sum.mean())
        total = total + loss.mean()
    return total


def local_mix(
    code: Tensor,
    attention: Tensor,
    grid: tuple[int, int],
    *,
    sigma: float = 28.0,
    low_quantile: float = 0.1,
    high_quantile: float = 0.9,
) -> Tensor:
    """Mix each patch's code (B, T, D) with its 3 x 3 neighbours by attention logits (B, heads, T, T).

    The neighbourhood is a T x T mask, and each image's mixed code the sum of a T x T x D product, mostly zeros.
    """
    with torch.no_grad():
        logits = attention.mean(1).float()
        neighbours = _neighbours(grid, logits.device)
        images = []
        for image in logits:
            high = torch.quantile(image, high_quantile, dim=1, keepdim=True)
            low = torch.quantile(image, low_quantile, dim=1, keepdim=True)
            weight = sigma * torch.minimum(torch.maximum(image, low), high).softmax(1)
            weight[weight < weight.mean(1, keepdim=True)] = 0
            images.append(weight * neighbours)
        counts = neighbours.sum(1, keepdim=True)
    return torch.stack([(w[:, :, None] * c[None]).sum(1) / counts for w, c in zip(images, code)]).to(code.dtype)


def _with_thresholds(x: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    x = F.normalize(x, dim=1)
    return x, (x @ F.normalize(pool, dim=1).T).amax(1)


def _mask(own: Tensor, own_best: Tensor, x: Tensor, best: Tensor) -> Tensor:
    """[s_ij > R_i or s_ij > R_j] for an image's own rows and all columns, as floating point."""
    similarity = own @ x.T
    row = own_best[:, None].repeat(1, x.shape[0])
    return torch.logical_or((similarity > row).to(x.dtype), (similarity > best).to(x.dtype)).to(x.dtype)


def _log_prob(anchors: Tensor, x: Tensor, denominator: Tensor, temperature: float) -> Tensor:
    logits = anchors @ x.T / temperature
    logits = logits - logits.detach().amax(1, keepdim=True)
    return logits - (logits.exp() * denominator).sum(1, keepdim=True).log()


def _neighbours(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(T, T), 1 where two places of the grid are at most one row and one column apart."""
    y, x = (c.flatten() for c in torch.meshgrid(*(torch.arange(s, device=device) for s in grid), indexing="ij"))
    near = ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)
    return near.float()


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)
