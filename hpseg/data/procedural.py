"""Textures and mosaics drawn from nothing: images for pre-training, and images with known masks for the demo.

A *texture* is a function ``(rng, y, x) -> field``: float32 values in [0, 1] over pixel coordinates (H, W).
`colour` turns a field into an RGB image with a random palette and contrast, so the same texture comes in many colours.
`mosaic` fills a random partition of the plane with textures and returns the mask that made it.
Everything is a function of one `numpy.random.Generator`: the same seed gives the same bytes.
"""

import numpy as np


def _grid(size):
    """Pixel coordinates y, x (H, W) float32 of a square image."""
    return np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32), indexing="ij")


def _frame(rng, y, x, low, high):
    """Coordinates in a randomly rotated, shifted frame, in units of a random period of `low` to `high` pixels."""
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(low), np.log(high)))
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform(0, 1)
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + rng.uniform(0, 1)
    return u.astype(np.float32), v.astype(np.float32)


def _unit(field):
    """Stretch a field to [0, 1] between its 2nd and 98th percentile."""
    low, high = np.quantile(field, [0.02, 0.98])
    return np.clip((field - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _noise(rng, shape, power):
    """Noise whose spectrum is `power(fy, fx)`, frequencies in cycles per pixel; stretched to [0, 1]."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None]
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) * power(fy, fx)
    return _unit(np.fft.irfft2(spectrum, shape))


def _sharpen(field, width):
    """A soft step at 0.5, `width` wide: 1 leaves a ramp, small values give hard edges."""
    return np.clip((field - 0.5) / width + 0.5, 0, 1).astype(np.float32)


def _nearest(y, x, sites):
    """Distances (H, W) to the nearest and second nearest of `sites` (S, 2), and the nearest one's index."""
    distance = np.sqrt((y[..., None] - sites[:, 0]) ** 2 + (x[..., None] - sites[:, 1]) ** 2)
    index = distance.argmin(-1)
    two = np.partition(distance, 1, axis=-1)
    return two[..., 0], two[..., 1], index


def stripes(rng, y, x, low=5, high=11):
    u, _ = _frame(rng, y, x, low, high)
    return _sharpen(0.5 + 0.5 * np.sin(2 * np.pi * u), rng.uniform(0.3, 1))


def checks(rng, y, x, low=7, high=14):
    u, v = _frame(rng, y, x, low, high)
    return _sharpen(0.5 + 0.5 * np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v), rng.uniform(0.15, 0.5))


def dots(rng, y, x, low=6, high=12):
    u, v = _frame(rng, y, x, low, high)
    row = np.floor(v * 1.155)
    u = u + 0.5 * (row % 2)
    distance = np.hypot(u - np.floor(u) - 0.5, (v * 1.155 - row - 0.5) / 1.155)
    return np.clip((rng.uniform(0.24, 0.34) - distance) / 0.12 + 0.5, 0, 1).astype(np.float32)


def bricks(rng, y, x, low=7, high=12):
    u, v = _frame(rng, y, x, low, high)
    row = np.floor(v)
    u = u / 2.2 + 0.5 * (row % 2)
    joint = np.minimum(np.abs(u - np.round(u)) * 2.2, np.abs(v - np.round(v)))
    return np.clip(joint / 0.16 - 0.3, 0, 1).astype(np.float32)


def waves(rng, y, x, low=6, high=12):
    u, v = _frame(rng, y, x, low, high)
    bend = rng.uniform(0.5, 0.9) * np.sin(2 * np.pi * v / rng.uniform(2, 3.5))
    return _sharpen(0.5 + 0.5 * np.sin(2 * np.pi * (u + bend)), rng.uniform(0.3, 1))


def cells(rng, y, x, low=9, high=16):
    step = rng.uniform(low, high)
    top, left = y.min() - step, x.min() - step
    rows, columns = int((y.max() - top) / step) + 2, int((x.max() - left) / step) + 2
    sites = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    sites = (sites + rng.uniform(0, 0.9, sites.shape)) * step + np.array([top, left])
    grid = np.round((np.stack([y, x], -1) - np.array([top, left])) / step).astype(int)
    best = np.full((2, *y.shape), np.inf, np.float32)  # nearest and second nearest of the sites around
    for dy in (-2, -1, 0, 1):
        for dx in (-2, -1, 0, 1):
            cell = np.clip(grid + np.array([dy, dx]), 0, (rows - 1, columns - 1))
            site = sites[cell[..., 0] * columns + cell[..., 1]]
            inside = (grid[..., 0] + dy == cell[..., 0]) & (grid[..., 1] + dx == cell[..., 1])
            distance = np.where(inside, np.hypot(y - site[..., 0], x - site[..., 1]), np.inf)
            best[1] = np.minimum(best[1], np.maximum(best[0], distance))
            best[0] = np.minimum(best[0], distance)
    return np.clip((best[1] - best[0]) / (0.25 * step), 0, 1).astype(np.float32)


def grain(rng, y, x, low=2.5, high=4.5):
    period = rng.uniform(low, high)
    return _noise(rng, y.shape, lambda fy, fx: np.exp(-(((np.hypot(fy, fx) - 1 / period) * 9) ** 2)))


def fibres(rng, y, x, low=3, high=5):
    angle, period = rng.uniform(0, np.pi), rng.uniform(low, high)

    def power(fy, fx):
        along, across = np.cos(angle) * fy - np.sin(angle) * fx, np.cos(angle) * fx + np.sin(angle) * fy
        return np.exp(-((along * 30) ** 2) - ((np.abs(across) - 1 / period) * 8) ** 2)

    return _noise(rng, y.shape, power)


def clouds(rng, y, x, low=1.2, high=1.8):
    slope = rng.uniform(low, high)
    return _noise(rng, y.shape, lambda fy, fx: np.maximum(np.hypot(fy, fx), 1 / 64) ** -slope)


def rings(rng, y, x, low=5, high=9):
    u, v = _frame(rng, y, x, 22, 30)
    distance = np.hypot(u - np.round(u), v - np.round(v)) * 26
    return _sharpen(0.5 + 0.5 * np.cos(2 * np.pi * distance / rng.uniform(low, high)), rng.uniform(0.3, 1))


def plain(rng, y, x):
    u, v = _frame(rng, y, x, 150, 600)
    return _unit(u + 0.3 * v)


TEXTURES = {f.__name__: f for f in (stripes, checks, dots, bricks, waves, cells, grain, fibres, clouds, rings, plain)}


def colour(rng, field, contrast=(0.25, 0.9)):
    """Paint a field (H, W) with two random colours at least `contrast` apart -> float32 RGB (H, W, 3) in [0, 1]."""
    centre, direction = rng.uniform(0.25, 0.75, 3), rng.normal(size=3) * 0.5 + rng.choice([-1, 1])
    direction *= rng.uniform(*contrast) / np.abs(direction).max()
    return np.clip(centre + (field[..., None] - 0.5) * direction, 0, 1).astype(np.float32)


def partition(rng, size, regions):
    """Cut a square into wavy regions around random sites -> int64 (size, size) in 0..regions-1."""
    y, x = _grid(size)
    bend = [
        (_noise(rng, (size, size), lambda fy, fx: np.exp(-((np.hypot(fy, fx) * size / 3) ** 2))) - 0.5) * size / 3
        for _ in range(2)
    ]
    sites = rng.uniform(0.08, 0.92, (16, regions, 2)) * size  # of 16 draws the one that spreads its sites best
    gaps = np.linalg.norm(sites[:, :, None] - sites[:, None], axis=-1) + np.eye(regions) * size * 2
    return _nearest(y + bend[0], x + bend[1], sites[gaps.min((1, 2)).argmax()])[2]


def finish(rng, image, noise=0.02):
    """Uneven light and a little sensor noise over a float image -> uint8 RGB (H, W, 3)."""
    y, x = _grid(image.shape[0])
    u, v = _frame(rng, y, x, image.shape[0], 3 * image.shape[0])
    light = 1 + rng.uniform(0, 0.25) * np.sin(2 * np.pi * u) * np.cos(np.pi * v)
    image = image * light[..., None] + rng.normal(size=image.shape).astype(np.float32) * noise * rng.uniform(0, 1)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def mosaic(rng, size, textures, regions):
    """A mosaic of named textures, each region painted anew -> (uint8 RGB (size, size, 3), int64 mask (size, size)).

    `mask` indexes `textures`. A region takes its texture at random, all different while there are enough names,
    and its colours at random: two regions of a class need not share a colour, and two classes may.
    """
    y, x = _grid(size)
    order = np.concatenate([rng.permutation(len(textures)) for _ in range(-(-regions // len(textures)))])[:regions]
    cut = partition(rng, size, regions)
    image = np.zeros((size, size, 3), np.float32)
    for region, texture in enumerate(order):
        painted = colour(rng, TEXTURES[textures[texture]](rng, y, x))
        image[cut == region] = painted[cut == region]
    return finish(rng, image), order[cut].astype(np.int64)


def _blobs(rng, size):
    """Overlapping ellipses of texture on a textured ground: the crude anatomy of a scene."""
    y, x = _grid(size)
    names = list(TEXTURES)
    image = colour(rng, TEXTURES[rng.choice(["plain", "clouds", "grain"])](rng, y, x), (0.1, 0.5))
    for _ in range(rng.integers(2, 7)):
        u, v = _frame(rng, y - rng.uniform(0, size), x - rng.uniform(0, size), size / 10, size / 3)
        inside = u**2 + (v * rng.uniform(0.5, 2)) ** 2 < 1
        image[inside] = colour(rng, TEXTURES[rng.choice(names)](rng, y, x))[inside]
    return image


def random_image(rng, size=160):
    """One unlabelled image for pre-training, uint8 RGB (size, size, 3): a mosaic, a scene of blobs, or a mixture."""
    names, kind = list(TEXTURES), rng.uniform()
    if kind < 0.5:
        return mosaic(rng, size, names, int(rng.integers(2, 8)))[0]
    if kind < 0.8:
        return finish(rng, _blobs(rng, size))
    y, x = _grid(size)  # two textures, one carrying the other
    fine, coarse = (TEXTURES[rng.choice(names)] for _ in range(2))
    carrier = coarse(rng, y / 3, x / 3)[..., None]
    return finish(rng, carrier * colour(rng, fine(rng, y, x)) + (1 - carrier) * colour(rng, fine(rng, y, x)))
