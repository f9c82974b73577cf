"""Local mixing on whole matrices in fp64: what the kernels are held to."""

from __future__ import annotations

import torch


def neighbors(height, width):
    """Index (T, 9) of each token's neighbours (0 off the grid), and whether they lie on the grid."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    yy = torch.stack([y + dy for dy in (-1, 0, 1) for _ in range(3)], -1).reshape(-1, 9)
    xx = torch.stack([x + dx for _ in range(3) for dx in (-1, 0, 1)], -1).reshape(-1, 9)
    inside = (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
    return torch.where(inside, yy * width + xx, 0), inside


def mix(code, weights, height, width):
    index, inside = neighbors(height, width)
    return torch.einsum("btn,btnd->btd", torch.where(inside, weights, 0), code[:, index])


def published_bound(device: str) -> float:
    """Largest difference to a published output, of its largest number: 1e-6 for sums in fp32, more on a GPU.

    There a weight is a quotient of approximate exponentials. PTX documents a relative error of at most 2^-22 for
    ex2.approx (CUDA C++: two units, as much, for expf), which both sides may have, and two units for a division.
    Logits of the published data lie within 0.1 of a quantile where they are not clamped: their exponents add nothing.
    """
    return 1e-6 + (0 if device == "cpu" else 3 * 2**-22)


def check_weights(ours, logits, grid, low=0.1, high=0.9, bound=2e-6):
    """Against the published steps: a tap is kept where its softmax is not below the row's mean 1/T.

    Within 1e-5 of it (fp64: 1e-11) either is right, and so is nothing else. Weights that are kept differ by as little
    of themselves, and by `bound` (fp64: 1e-12) of the largest.
    """
    exact = ours.dtype == torch.float64
    assert ours.dtype in (torch.float32, torch.float64)
    rounding, bound = (1e-11, 1e-12) if exact else (1e-5, bound)
    logits = logits.double().clamp_min(-1e30)
    logits = logits.mean(1) if logits.ndim == 4 else logits
    bounds = [logits.quantile(q, -1, keepdim=True) for q in (low, high)]
    p = torch.softmax(torch.minimum(torch.maximum(logits, bounds[0]), bounds[1]), -1)
    index, inside = neighbors(*grid)
    above_mean = p.gather(2, index.expand(len(p), -1, -1)) * p.shape[2] - 1
    kept = 28 * (above_mean + 1) / p.shape[2] / inside.sum(1, keepdim=True)
    largest = torch.where((above_mean >= -rounding) & inside, kept, 0).max()
    near = (ours - kept).abs() <= torch.minimum(rounding * kept, bound * largest)
    right = torch.where(above_mean > rounding, near, torch.where(above_mean < -rounding, ours == 0, near | (ours == 0)))
    assert torch.where(inside, right, ours == 0).all()
