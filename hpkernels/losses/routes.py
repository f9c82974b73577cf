"""Which way the pairs of a denominator are evaluated: all tiles swept, or the columns gathered that bits name.

Both give the same numbers to rounding (ops/contrastive/README.md); the density of the bits decides which is cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.pair_bits.op import count_bits

# Up to this rate, for each image that shares a row of random columns and at most the second figure, the columns are
# gathered instead of swept. Measured break-even on a CPU: 0.06 for one image, 0.3 for eight (op README). On a GPU,
# where it was not measured, the limit is what the column lists have room for, with a margin
# (ops/contrastive/triton/lists.py: 5 / 32).
SPARSE_RATE_PER_IMAGE, SPARSE_RATE_LIMIT = 0.06, {"cpu": 0.25, "cuda": 0.125}
# The same for the pairs of P and Q, which are gathered one by one. Measured on a CPU (op README).
SPARSE_PAIRS_LIMIT = 0.1


def _limit(images: int, device: torch.device) -> float:
    """A panel of anchors may be less than an image: then it counts as one."""
    limit = SPARSE_RATE_LIMIT.get(device.type, SPARSE_RATE_LIMIT["cpu"])
    return min(limit, SPARSE_RATE_PER_IMAGE * max(1, images))


def form_of_rate(rate: float, images: int, device: torch.device) -> str:
    """For negatives of a known rate whose rows are shared by that many anchors each."""
    return "sparse" if rate <= _limit(images, device) else "dense"


def form_of_masks(negatives: Tensor, columns: int, anchors: int, backend: str, *pairs: Tensor) -> str:
    """For negatives (R, W), of which each row serves anchors / R of the anchors, and pairs (N, W), by their bits.

    They are counted on a CPU, where that takes a thousandth of the time of the loss. Not on a GPU, where reading the
    count would wait for the device (and break the capture of a graph), nor in what torch.compile makes, which cannot
    branch on numbers: there all tiles are swept, which costs the same whatever the mask. To gather the columns of a
    full mask costs several times as much, the more so the fewer anchors share a row.
    """
    if not negatives.is_cpu or torch.compiler.is_compiling():
        return "dense"
    rows = max(1, negatives.shape[0])
    costs = [_rate(negatives, columns, backend) / _limit(anchors // rows, negatives.device)]
    costs += [_rate(bits, columns, backend) / SPARSE_PAIRS_LIMIT for bits in pairs]
    return "sparse" if sum(costs) <= 1.0 else "dense"


def _rate(bits: Tensor, columns: int, backend: str) -> float:
    return float(count_bits([bits], backend).sum(dtype=torch.int64)) / max(1, bits.shape[0] * columns)
