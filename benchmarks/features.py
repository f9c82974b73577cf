"""Synthetic patch features with the coherence of real ones.

Patches of a photograph are no independent draws: neighbours resemble each other, an image has its own light and
texture, and objects of one kind recur in many images. Random unit vectors have none of this, and a loss over their
pairs meets positives scattered at random, which no real batch has. Here a patch at place p of image b is

    f_p = normalise( m + 2 sum_k softmax_k(3 g_bk(p)) c_k + TEXTURE * v_b(p) + n_p )

with m a common direction, c_k the classes shared by all images, g_bk smooth random fields over the grid (each image
sees `CLASSES_PER_IMAGE` of the classes), v_b(p) a smooth field of vectors private to the image, n_p white noise of
unit length. A pool row is one patch of an image that is not in the batch. The density of the positives is set by the
noise of the pool's rows: the noisier they are, the lower the best match R_i in the pool, and the more pairs exceed it.
The positives stay coherent: most of a sparse mask lies within images, in patches of like surroundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 64
CLASSES_PER_IMAGE = 6
TEXTURE_DIRECTIONS = 24
TEXTURE = 0.4
# Real features have 0.2 to 1 % (measured on photographs). tests/test_benchmarks.py holds the knob to what it promises.
DENSITY = 0.002
POOL_NOISE = 4.0  # at most: far more positives than any real batch has
SAMPLE = 2048  # patches that stand for all while the pool is set
BISECTIONS = 12


@dataclass
class Batch:
    """One training step's inputs. Rows are unit vectors; rows of one image are consecutive."""

    features: Tensor  # (N, C) backbone features
    pool: Tensor  # (M, C)
    head_features: Tensor  # (N, D) momentum head
    head_pool: Tensor  # (M, D)
    z: Tensor  # (N, D) requires grad
    z_local: Tensor  # (N, D) requires grad
    tokens: int  # T
    mask: Tensor | None = (
        None  # bool (T, N), the random columns of the denominator; None: every contender draws its own
    )
    seed: int | None = None  # from which hpkernels draws them; None: a new one a call


def make_batch(
    images: int,
    grid: tuple[int, int] = (28, 28),
    *,
    channels: int = 384,
    code: int = 512,
    pool: int = 2048,
    density: float = DENSITY,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """A step's inputs for `images` images of grid[0] x grid[1] patches, the same for the same arguments and device.

    `density`: the share of pairs in P and in Q, as near as the pools allow (found on a sample of the patches).
    """
    generator = torch.Generator(device).manual_seed(seed)
    logits = _class_logits(images, grid, generator)
    pool_logits = _sparse_logits(_normal(generator, pool, CLASSES), generator)

    def rows(width: int) -> tuple[Tensor, Tensor]:
        space = _Space(width, generator)
        batch = space.patches(logits, _texture(images, grid, width, generator), generator)
        clean = space.clean(pool_logits, _texture(pool, None, width, generator))
        return batch, _pool_of_density(batch, clean, density, generator)

    features, feature_pool = rows(channels)
    head_features, head_pool = rows(code)
    z = head_features + 0.5 * F.normalize(_normal(generator, head_features.shape), dim=1)
    z_local = F.normalize(_smooth_rows(z, images, grid), dim=1)

    def place(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype)

    return Batch(
        features=place(features),
        pool=place(feature_pool),
        head_features=place(head_features),
        head_pool=place(head_pool),
        z=place(F.normalize(z, dim=1)).requires_grad_(),
        z_local=place(z_local).requires_grad_(),
        tokens=grid[0] * grid[1],
    )


def make_attention(
    images: int, grid: tuple[int, int], *, heads: int = 6, seed: int = 0, device="cpu", dtype=torch.float32
) -> Tensor:
    """Attention logits (B, heads, T, T): dot products of smooth query and key fields, highest near the diagonal."""
    generator = torch.Generator(device).manual_seed(seed)
    width, tokens = 32, grid[0] * grid[1]
    shared = _field((images * heads, width), grid, generator)
    query = shared + 0.5 * _normal(generator, shared.shape)
    key = shared + 0.5 * _normal(generator, shared.shape)
    logits = query.flatten(2).transpose(1, 2) @ key.flatten(2) / width**0.5
    return logits.reshape(images, heads, tokens, tokens).to(device=device, dtype=dtype)


def make_labels(images: int, grid: tuple[int, int], *, seed: int = 0, device="cpu") -> Tensor:
    """(N,) int64: the class that is largest in each patch of the batch of the same arguments."""
    return _class_logits(images, grid, torch.Generator(device).manual_seed(seed)).argmax(1)


def one_positive_pool(x: Tensor) -> Tensor:
    """A pool under which a patch has about one positive, its nearest: R_i is between its two best similarities."""
    generator = torch.Generator(x.device).manual_seed(5)
    rows = []
    for block, first in zip(x.float().split(1024), range(0, len(x), 1024)):
        similarity = block @ x.float().T
        similarity[:, first : first + len(block)].fill_diagonal_(-1)
        threshold = similarity.topk(2, dim=1).values.mean(1, keepdim=True)
        other = _normal(generator, block.shape)
        other = F.normalize(other - (other * block).sum(1, keepdim=True) * block, dim=1)
        rows.append(threshold * block + (1 - threshold**2).clamp_min(0).sqrt() * other)
    return torch.cat(rows).to(x.dtype)


def density(batch: Batch, panels: int = 64) -> dict[str, float]:
    """Fractions of pairs in P and Q and of non-empty square tiles of P, by plain torch, row panel by row panel.

    From all panels of 128 rows if there are at most `panels`, else from as many, evenly spread.
    """
    result = {}
    for name, x, pool in (("P", batch.features, batch.pool), ("Q", batch.head_features, batch.head_pool)):
        x, pool = x.float(), pool.float()
        best = (x @ pool.T).amax(1)
        n = x.shape[0]
        pairs = 0
        filled = {16: 0, 64: 0, 128: 0}
        starts = range(0, n, 128)
        starts = starts[:: -(-len(starts) // panels)]
        seen = 0
        for start in starts:  # the published mask, one panel of rows at a time
            rows = slice(start, min(start + 128, n))
            seen += rows.stop - rows.start
            above = x[rows] @ x.T > torch.minimum(best[rows, None], best)
            above[:, rows].fill_diagonal_(False)
            pairs += int(above.sum())
            for side in filled:
                tiles = F.max_pool2d(above.float()[None], side, ceil_mode=True)
                filled[side] += int((tiles > 0).sum())
        result[name] = pairs / (seen * n)
        for side, count in filled.items():
            result[f"{name}_tiles_{side}"] = count / (-(-seen // side) * -(-n // side))
    return result


class _Space:
    """The common direction and the classes of one feature space."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        self.mean = F.normalize(_normal(generator, width), dim=0)
        self.classes = F.normalize(_normal(generator, CLASSES, width), dim=1)

    def clean(self, logits: Tensor, texture: Tensor) -> Tensor:
        return self.mean + 2 * (3 * logits).softmax(1) @ self.classes + TEXTURE * texture

    def patches(self, logits: Tensor, texture: Tensor, generator: torch.Generator) -> Tensor:
        return F.normalize(self.clean(logits, texture) + _white(texture.shape, generator), dim=1)


def _pool_of_density(x: Tensor, clean: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The pool whose noise gives unit rows x the wanted density of positives, by bisection."""
    noise = _white(clean.shape, generator)
    sample = x[torch.randperm(len(x), generator=generator, device=x.device)[:SAMPLE]]
    similarity = (sample @ sample.T).fill_diagonal_(-1)
    to_clean, to_noise = sample @ clean.T, sample @ noise.T
    low, high = 0.0, POOL_NOISE
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        best = ((to_clean + middle * to_noise) / (clean + middle * noise).norm(dim=1)).amax(1)
        found = (similarity > torch.minimum(best[:, None], best)).float().mean()
        low, high = (middle, high) if found < density else (low, middle)
    return F.normalize(clean + (low + high) / 2 * noise, dim=1)


def _white(size: torch.Size, generator: torch.Generator) -> Tensor:
    return _normal(generator, *size) / size[1] ** 0.5


def _normal(generator: torch.Generator, *size) -> Tensor:
    return torch.randn(*size, generator=generator, device=generator.device)


def _field(leading: tuple[int, ...], grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Smooth Gaussian fields of mean 0 and variance 1: coarse noise, enlarged, plus a finer octave."""
    count = torch.Size(leading).numel()
    total = torch.zeros(count, 1, *grid, device=generator.device)
    for cells, weight in ((5, 1.0), (12, 0.7)):
        noise = _normal(generator, count, 1, cells, cells)
        total += weight * F.interpolate(noise, size=grid, mode="bicubic", align_corners=False)
    return (total / total.std()).reshape(*leading, *grid)


def _sparse_logits(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Keep CLASSES_PER_IMAGE random classes of each row (image), the others get a large negative logit."""
    present = (
        torch.rand(logits.shape[:2], generator=generator, device=generator.device)
        .topk(CLASSES_PER_IMAGE, dim=1)
        .indices
    )
    absent = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device).scatter(1, present, False)
    return logits.masked_fill(absent.reshape(*absent.shape, *[1] * (logits.ndim - 2)), -1e4)


def _class_logits(images: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    fields = _sparse_logits(_field((images, CLASSES), grid, generator), generator)
    return fields.flatten(2).transpose(1, 2).reshape(-1, CLASSES)


def _texture(images: int, grid: tuple[int, int] | None, width: int, generator: torch.Generator) -> Tensor:
    """Unit vectors smooth over each image's grid, in directions of the image's own: (images * T, width)."""
    directions = _normal(generator, images, TEXTURE_DIRECTIONS, width) / width**0.5
    if grid is None:
        weights = _normal(generator, images, 1, TEXTURE_DIRECTIONS)
    else:
        weights = _field((images, TEXTURE_DIRECTIONS), grid, generator).flatten(2).transpose(1, 2)
    return F.normalize((weights @ directions).reshape(-1, width), dim=1)


def _smooth_rows(rows: Tensor, images: int, grid: tuple[int, int]) -> Tensor:
    maps = rows.detach().reshape(images, *grid, -1).permute(0, 3, 1, 2)
    smooth = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    return smooth.permute(0, 2, 3, 1).reshape(rows.shape)
