"""The strongest plain torch we could write for each job: what a careful user has without kernels of their own.

The loss of an image (of a block of rows, for the supervised loss) depends on the rows of that image alone, so its
backward pass can follow at once: the T x N tables of one image are all that is ever alive, memory is linear in N, and
nothing is computed twice. Both streams share the masks. The bodies have static shapes and no synchronisation, so that
torch.compile can fuse the comparisons and exponentials with each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # of a block, where nothing else sets it


def hidden_positive_step(
    streams: list[Tensor],
    features: Tensor,
    pool: Tensor,
    *,
    head_features: Tensor,
    head_pool: Tensor,
    head_weight: float,
    tokens_per_image: int,
    temperature: float = 0.8,
    base_temperature: float = 0.07,
    negative_rate: float = 0.02,
    negative_mask: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Forward and backward of `hpkernels.hidden_positive_loss`; gradients are left in the streams' `.grad`."""
    n, tokens = features.shape[0], tokens_per_image
    with torch.no_grad():
        searches = [_with_thresholds(features, pool), _with_thresholds(head_features, head_pool)]
        if negative_mask is None:
            negative_mask = torch.rand(tokens, n, device=features.device) < negative_rate
    units = [F.normalize(z, dim=1) for z in streams]
    leaves = [unit.detach().requires_grad_() for unit in units]
    scale = temperature / base_temperature * tokens / (len(streams) * n)
    body = _compiled(_image_loss) if compiled else _image_loss
    total = torch.zeros((), device=features.device)
    for start in range(0, n, tokens):
        first = torch.full((), start, device=features.device)
        rows = slice(start, start + tokens)
        own = [(x[rows], best[rows]) for x, best in searches]
        loss = body([x[rows] for x in leaves], leaves, own, searches, negative_mask, first, head_weight, temperature)
        loss = loss * scale
        loss.backward()
        total += loss.detach()
    torch.autograd.backward(units, [leaf.grad for leaf in leaves])
    return total


def _image_loss(own_streams, streams, own_searches, searches, negatives, first, head_weight, temperature) -> Tensor:
    """The loss of one image's rows against all columns, times the number of streams."""
    with torch.no_grad():
        column = torch.arange(negatives.shape[1], device=negatives.device)
        other = column != first + column[: negatives.shape[0], None]
        positives, extra = (_above(x, best, *own) & other for (x, best), own in zip(searches, own_searches))
        denominator = (positives | negatives) & other
        weight = positives.float() + head_weight * extra.float()
        weight = weight * positives.any(1, keepdim=True)
        weight_sum = weight.sum(1)
    total = 0.0
    for own, x in zip(own_streams, streams):
        logits = (own @ x.T).float() / temperature
        lse = logits.masked_fill(~denominator, torch.finfo(logits.dtype).min).logsumexp(1)
        total = total + (weight_sum * lse - (weight * logits).sum(1)).sum()
    return total / weight_sum.sum().clamp_min(torch.finfo(torch.float32).tiny)


def hidden_positives(features: Tensor, pool: Tensor) -> Tensor:
    """bool (N, N): `hpkernels.hidden_positives`, block of rows by block of rows into one byte a pair."""
    x, best = _with_thresholds(features, pool)
    out = torch.empty(len(x), len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        torch.gt(x[rows] @ x.T, torch.minimum(best[rows, None], best), out=out[rows])
    return out.fill_diagonal_(False)


def topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of the similarities, a block of queries at a time."""
    blocks = [torch.topk(queries[start : start + ROWS] @ keys.T, k) for start in range(0, len(queries), ROWS)]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


def supcon_step(z: Tensor, labels: Tensor, temperature: float, *, chunked: bool, compiled: bool = False) -> Tensor:
    """Forward and backward of SupCon, mean over anchors with a positive; the gradient is left in `z.grad`."""
    unit = F.normalize(z, dim=1)
    leaf = unit.detach().requires_grad_()
    counts = torch.bincount(labels)[labels] - 1
    inverse = torch.where(counts > 0, 1.0 / counts.clamp_min(1), 0.0)
    anchors = (counts > 0).sum()
    body = _compiled(_supcon_rows) if compiled else _supcon_rows
    total = torch.zeros((), device=z.device)
    step = ROWS if chunked else len(z)
    for start in range(0, len(z), step):
        rows = slice(start, start + step)
        first = torch.full((), start, device=z.device)
        loss = body(leaf[rows], leaf, labels[rows], labels, inverse[rows], first, temperature) / anchors
        loss.backward()
        total += loss.detach()
    unit.backward(leaf.grad)
    return total


def _supcon_rows(own, x, own_labels, labels, inverse, first, temperature) -> Tensor:
    column = torch.arange(len(labels), device=labels.device)
    other = column != first + column[: len(own), None]
    positives = (own_labels[:, None] == labels) & other
    logits = (own @ x.T).float() / temperature
    lse = logits.masked_fill(~other, torch.finfo(logits.dtype).min).logsumexp(1)
    return ((inverse > 0) * lse - (positives * logits).sum(1) * inverse).sum()


def infonce(z: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Row i against all keys, key i its positive."""
    logits = F.normalize(z, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return F.cross_entropy(logits.float(), torch.arange(len(z), device=z.device))


def density(
    features: Tensor, memory: Tensor, groups: Tensor, memory_groups: Tensor, scales: tuple[int, ...], *, by_group: bool
) -> Tensor:
    """`hpkernels.neighbor_density`: torch.topk of the products of one class at a time, or of all of them at once."""
    x, memory = F.normalize(features, dim=1), F.normalize(memory, dim=1)
    if not by_group:
        similarity = (x @ memory.T).masked_fill_(groups[:, None] != memory_groups, -torch.inf)
        return _mean_of_scales(similarity, scales)
    out = torch.empty(len(x), device=x.device)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        out[rows] = _mean_of_scales(x[rows] @ memory[memory_groups == group].T, scales)
    return out


def _mean_of_scales(similarity: Tensor, scales: tuple[int, ...]) -> Tensor:
    best = torch.topk(similarity, min(max(scales), similarity.shape[1])).values
    return torch.stack([best[:, :k].mean(1) for k in scales]).mean(0)


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Centroids after Lloyd's iterations, scores a block of rows at a time; an empty cluster stays where it is."""
    centroids = start
    for _ in range(iterations):
        labels = _nearest(x, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        counts = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    _nearest(x, centroids)  # the labels that belong to them, as the libraries return
    return centroids


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    bias = centroids.square().sum(1) / -2
    return torch.cat([torch.addmm(bias, rows, centroids.T).argmax(1) for rows in x.split(16 * ROWS)])


def local_mix(code: Tensor, attention: Tensor, grid: tuple[int, int], *, sigma: float = 28.0) -> Tensor:
    """`hpkernels.local_mix` with a token's nine neighbours gathered, no T x T mask; weights image by image."""
    with torch.no_grad():
        places, valid = _neighbour_places(grid, code.device)
        weights = torch.stack([_neighbour_weights(image, places, valid, sigma) for image in attention]).to(code.dtype)
    padded = F.pad(code.unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    height, width = grid
    taps = (padded[:, y : y + height, x : x + width].flatten(1, 2) for y in range(3) for x in range(3))
    return sum(weights[:, :, n, None] * tap for n, tap in enumerate(taps))


def _neighbour_weights(attention: Tensor, places: Tensor, valid: Tensor, sigma: float) -> Tensor:
    logits = attention.float().mean(0)
    low, high = torch.quantile(logits, torch.tensor([0.1, 0.9], device=logits.device), dim=1)[..., None]
    clamped = logits.clamp(low, high)
    share = (clamped.gather(1, places) - clamped.logsumexp(1, keepdim=True)).exp()
    kept = valid & (share >= 1 / len(logits))
    return sigma * share * kept / valid.sum(1, keepdim=True)


def _neighbour_places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of the 3 x 3 neighbours, (T, 9), and which of them are on the grid."""
    y, x = (c.flatten() for c in torch.meshgrid(*(torch.arange(s, device=device) for s in grid), indexing="ij"))
    dy, dx = (c.flatten() for c in torch.meshgrid(*[torch.arange(-1, 2, device=device)] * 2, indexing="ij"))
    y, x = y[:, None] + dy, x[:, None] + dx
    valid = (y >= 0) & (y < grid[0]) & (x >= 0) & (x < grid[1])
    return torch.where(valid, y * grid[1] + x, 0), valid


def _with_thresholds(x: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    x, pool = F.normalize(x, dim=1), F.normalize(pool, dim=1)
    return x, torch.cat([(rows @ pool.T).amax(1) for rows in x.split(16 * ROWS)])


def _above(x: Tensor, best: Tensor, own: Tensor, own_best: Tensor) -> Tensor:
    return own @ x.T > torch.minimum(own_best[:, None], best)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
