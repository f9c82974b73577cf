"""Reference pools: random patches of random training images that set each anchor's threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hpseg.runtime.distributed import Share
from hpseg.runtime.messages import progress

Encode = Callable[[list[list[int]]], Iterable[tuple[Tensor, Share]]]


def draw_tokens(
    images: int,
    pool_size: int,
    pool_images: int,
    encode: Encode,
    batch_size: int,
    generator: torch.Generator,
    what: str = "pool",
) -> Tensor:
    """Features of `pool_size` random patches, as even over images as can be: (pool_size, C), the same on every rank.

    Takes n = min(images, pool_size, pool_images) different images and ceil(pool_size / n) random patches of each: one
    patch per image on a large set, several on a small one, so a pool is never short (and never holds empty rows).
    encode: batches of image numbers -> of each this rank's rows as mining sees them, features (b, T, C) and Share.
    generator: on the CPU, so that the choice is the same on every device; in the same state on every rank.
    what: the name of it, for whoever waits.
    """
    count = min(images, pool_size, pool_images)
    each = math.ceil(pool_size / count)
    chosen = torch.randperm(images, generator=generator)[:count].tolist()
    batches = [chosen[start : start + batch_size] for start in range(0, count, batch_size)]
    rows = []
    for features, share in progress(encode(batches), what, len(batches), "batch"):
        picks = torch.randint(features.shape[1], (share.total, each), generator=generator)[share.rows]
        picks = picks[..., None].expand(-1, -1, features.shape[2]).to(features.device)
        rows.append(share.gather(features.gather(1, picks)))
    # (images, each, C), read column by column: the first patch of every image, then the second of every image, ...
    return torch.cat(rows).transpose(0, 1).flatten(0, 1)[:pool_size].contiguous()
