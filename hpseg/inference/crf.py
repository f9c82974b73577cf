"""Dense CRF in plain torch: mean field with Gaussian pairwise terms, filtered on the permutohedral lattice.

Kraehenbuehl and Koltun, "Efficient inference in fully connected CRFs with Gaussian edge potentials", NIPS 2011; Adams,
Baek and Davis, "Fast high-dimensional filtering using the permutohedral lattice", Eurographics 2010. The lattice, and
not the exact sum over all pairs, is what published "+ CRF" figures were made with; labels agree with pydensecrf's.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

SMALLEST_PROBABILITY = 1e-5


@torch.no_grad()
def dense_crf(
    image: Tensor,
    probabilities: Tensor,
    *,
    iterations: int = 10,
    gaussian_xy: float = 1.0,
    gaussian_weight: float = 3.0,
    bilateral_xy: float = 67.0,
    bilateral_rgb: float = 3.0,
    bilateral_weight: float = 4.0,
) -> Tensor:
    """Marginals after mean-field steps of a fully connected CRF over the pixels of an image.

        Q <- softmax(log p + w_1 K_1 Q + w_2 K_2 Q),  K = D^(-1/2) k D^(-1/2),  k_ij = exp(-|f_i - f_j|^2 / 2)

    with f = (x, y) / gaussian_xy in K_1 and f = (x, y) / bilateral_xy, (r, g, b) / bilateral_rgb in K_2; p is clipped
    to 1e-5 from below. The defaults are the constants of STEGO and Hidden Positives.

    Args:
        image: uint8 (H, W, 3), not normalised. The lattice depends on the order of the channels: the published
            evaluations pass BGR, so reverse them to agree with those label for label.
        probabilities: (K, H, W), any floating dtype, on the same device.

    Returns:
        fp32 (K, H, W); sums to 1 over K.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected.
    """
    _check(image, probabilities, iterations)
    classes, height, width = probabilities.shape
    device = probabilities.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    position = torch.stack([x, y], -1).reshape(-1, 2).float()
    colour = image.reshape(-1, 3).float()
    kernels = [
        (gaussian_weight, position / gaussian_xy),
        (bilateral_weight, torch.cat([position / bilateral_xy, colour / bilateral_rgb], 1)),
    ]
    filters = [_Filter(features, weight) for weight, features in kernels if weight]
    # A pixel's classes side by side, and no fresh memory of this size in the loop: it costs as much as a product.
    unary = probabilities.float().flatten(1).T.clamp_min(SMALLEST_PROBABILITY).log().contiguous()
    q, logits = unary.softmax(1), torch.empty_like(unary)
    for _ in range(iterations):
        logits.copy_(unary)
        for pairwise in filters:
            pairwise.add_to(logits, q)
        torch.softmax(logits, 1, out=q)
    return q.T.reshape(classes, height, width).contiguous()


class _Filter:
    """q (N, K) -> weight * D^(-1/2) k D^(-1/2) q, with k the Gaussian kernel of features (N, d) on their lattice.

    Splatting pixels onto lattice vertices, blurring along each axis and slicing are sparse matrices; their products go
    to buffers made once, because fresh memory of this size costs more than the products.
    """

    def __init__(self, features: Tensor, weight: float):
        corners, barycentric = _enclosing_simplices(features)
        n, size, dimensions = corners.shape
        codes, base = _codes(corners)
        self.codes, vertex, counts = torch.unique(codes, return_inverse=True, return_counts=True)
        self.vertex, self.order = vertex.flatten(), vertex.flatten().argsort(stable=True)
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.blurs = [self._blur(axis, base) for axis in range(size)]
        self.buffers: dict[int, list[Tensor]] = {}
        self._weigh(barycentric / (1 + 2.0**-dimensions) ** 0.5)
        degree = self.add_to(features.new_full((n, 1), 1e-20), features.new_ones(n, 1))
        self._weigh(barycentric * degree.rsqrt() * (weight / (1 + 2.0**-dimensions)) ** 0.5)

    def _weigh(self, weights: Tensor) -> None:
        """Weights (N, d + 1) between a pixel and its corners, in both directions."""
        (n, size), m = weights.shape, len(self.codes)
        ends = torch.arange(0, n * size + 1, size, device=weights.device)
        self.slice = _csr(ends, self.vertex, weights.flatten(), (n, m))
        self.splat = _csr(self.starts, self.order // size, weights.flatten()[self.order], (m, n))

    def add_to(self, out: Tensor, q: Tensor) -> Tensor:
        """Adds the filtered q (N, K) to out (N, K), which it returns."""
        k = q.shape[1]
        if k not in self.buffers:
            self.buffers[k] = [q.new_zeros(len(self.codes), k) for _ in range(2)]
        source, target = self.buffers[k]
        torch.addmm(source, self.splat, q, beta=0, out=source)
        for blur in self.blurs:
            torch.addmm(target, blur, source, beta=0, out=target)
            source, target = target, source
        return torch.addmm(out, self.slice, source, out=out)

    def _blur(self, axis: int, base: Tensor) -> Tensor:
        """A vertex plus half of its two neighbours along a lattice axis (coordinates +-1, on the axis -+d)."""
        m, size = len(self.codes), len(base) + 1
        step = -int(base.sum()) + (int(base[axis]) * size if axis < len(base) else 0)
        vertices = torch.arange(m, device=base.device)
        after = torch.searchsorted(self.codes, self.codes + step).clamp_(max=m - 1)
        found = self.codes[after] == self.codes + step
        before, preceded = torch.zeros_like(vertices), torch.zeros_like(found)
        before[after[found]], preceded[after[found]] = vertices[found], True  # who is after me has me before it
        columns = torch.stack([vertices, after, before], 1)
        values = torch.stack([torch.ones_like(found, dtype=torch.float32), 0.5 * found, 0.5 * preceded], 1)
        ends = torch.arange(0, 3 * m + 1, 3, device=base.device)
        return _csr(ends, columns.flatten(), values.flatten(), (m, m))


def _csr(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Columns of a row need not be in order; 32-bit indices make the products a third faster."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # the user cannot act on it
        return torch.sparse_csr_tensor(ends.int(), columns.int(), values, shape, check_invariants=False)


def _enclosing_simplices(features: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of the lattice simplex around each feature, (N, d + 1, d) int64, and its weights (N, d + 1).

    Features (N, d) are mapped to the hyperplane of d + 1 coordinates that sum to zero; of a lattice point the last
    coordinate follows from the others and is left out.
    """
    n, d = features.shape
    size = d + 1
    axis = torch.arange(1, size, device=features.device, dtype=features.dtype)
    scaled = features * ((2 / 3) ** 0.5 * size / torch.sqrt(axis * (axis + 1)))
    later = scaled.flip(1).cumsum(1).flip(1)  # sum of this and the later ones
    elevated = torch.cat([later, later.new_zeros(n, 1)], 1)
    elevated[:, 1:] -= axis * scaled

    below = torch.floor(elevated / size) * size  # the nearest point all of whose coordinates are multiples of d + 1
    above = torch.ceil(elevated / size) * size
    nearest = torch.where(above - elevated < elevated - below, above, below)
    excess = (nearest.sum(1, keepdim=True) / size).round().long()
    rest = elevated - nearest
    # Rank of each coordinate's rest, largest first; coordinates that the excess pushes out of 0..d wrap around.
    order = torch.arange(size, device=features.device)
    first = (rest[:, None, :] > rest[:, :, None]) | ((rest[:, None, :] == rest[:, :, None]) & (order < order[:, None]))
    rank = first.sum(2) + excess
    wrap = (rank < 0).long() - (rank > d).long()
    rank += size * wrap
    nearest += size * wrap

    # Barycentric weights from the gaps between the rests in order of rank.
    ranked = torch.empty_like(elevated).scatter_(1, rank, (elevated - nearest) / size)
    weights = torch.empty_like(ranked)
    weights[:, 0] = 1 + ranked[:, d] - ranked[:, 0]
    weights[:, 1:] = (ranked[:, :-1] - ranked[:, 1:]).flip(1)
    # Corner k adds k to every coordinate, and takes d + 1 away again from the k of highest rank.
    corner = order[None, :, None]
    offset = corner - size * (rank[:, None, :d] > d - corner).long()
    return nearest.long()[:, None, :d] + offset, weights


def _codes(vertices: Tensor) -> tuple[Tensor, Tensor]:
    """One int64 per lattice point, and the place value of each coordinate; neighbours' codes stay distinct, too."""
    margin = vertices.shape[1]
    lowest = vertices.amin((0, 1)) - margin
    span = vertices.amax((0, 1)) - lowest + 1 + margin
    base = torch.cat([span.new_ones(1), span[:-1]]).cumprod(0)
    return ((vertices - lowest) * base).sum(-1), base


def _check(image: Tensor, probabilities: Tensor, iterations: int) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise TypeError(f"image: expected a uint8 tensor (H, W, 3), got {_describe(image)}")
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point() or probabilities.ndim != 3:
        raise TypeError(f"probabilities: expected a floating tensor (K, H, W), got {_describe(probabilities)}")
    if probabilities.shape[1:] != image.shape[:2] or probabilities.numel() == 0:
        expected = f"(K, {image.shape[0]}, {image.shape[1]}) as in image, K >= 1"
        raise ValueError(f"probabilities: expected {expected}, got {_describe(probabilities)}")
    if probabilities.device != image.device:
        raise ValueError(
            f"probabilities: expected a tensor on {image.device} as image, got one on {probabilities.device}"
        )
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise ValueError(f"iterations: expected an int >= 0, got {iterations!r}")
    if not torch.isfinite(probabilities).all():
        raise ValueError("probabilities: expected finite numbers, got NaN or infinity")


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
