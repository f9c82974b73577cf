"""The probe's loss over all pixels against torch's, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hpseg.evaluation import pixel_loss
from hpseg.evaluation.pixel_loss import Labels, PixelCrossEntropy, upsampling

CPU = torch.device("cpu")
SHAPES = [  # (classes, grid of patches, pixels)
    (7, (6, 9), (53, 80)),
    (3, (1, 1), (5, 4)),
    (4, (3, 3), (100, 1)),
    (2, (12, 10), (7, 31)),  # fewer rows of pixels than of patches
    (5, (2, 20), (90, 20)),
]


def plain(scores, truths, grids, classes):
    """Sum over the pixels of all pictures, by torch in fp64, and its gradient by scores (rows, K)."""
    rows, total, first = scores.double().requires_grad_(), 0, 0
    for truth, (h, w) in zip(truths, grids, strict=True):
        maps = rows[first : first + h * w].T.unflatten(1, (h, w))[None]
        first += h * w
        truth = torch.where((truth >= 0) & (truth < classes), truth, -1)[None]
        full = F.interpolate(maps, truth.shape[1:], mode="bilinear", align_corners=False)
        total = total + F.cross_entropy(full, truth, ignore_index=-1, reduction="sum")
    total.backward()
    return total.detach(), rows.grad


@pytest.mark.parametrize("floats", [1, 2_000, 1 << 17])
@pytest.mark.parametrize("classes, grid, size", SHAPES)
def test_loss_and_gradient_are_torchs(classes, grid, size, floats, monkeypatch):
    """Two pictures of different sizes; rounding: fp32 sums over the pixels around a patch."""
    monkeypatch.setattr(pixel_loss, "CPU_FLOATS", floats)
    torch.manual_seed(classes)
    grids, sizes = [grid, (4, 3)], [size, (33, 20)]
    truths = [torch.randint(-1, classes + 2, one) for one in sizes]
    scores = torch.randn(sum(h * w for h, w in grids), classes) * 5
    expected, expected_gradient = plain(scores, truths, grids, classes)
    labels = [Labels.of(truth, classes, of) for truth, of in zip(truths, grids, strict=True)]
    assert sum(one.pixels for one in labels) == sum(int(((t >= 0) & (t < classes)).sum()) for t in truths)
    rows = scores.clone().requires_grad_()
    with PixelCrossEntropy(CPU) as loss:
        found = loss(rows, labels)
        (found / 3).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    allowed = 1e-6 * expected_gradient.abs().max()
    torch.testing.assert_close(3 * rows.grad.double(), expected_gradient, rtol=0, atol=float(allowed))


def test_pictures_without_a_pixel_that_counts_and_scores_far_apart():
    rows = (torch.randn(12, 4) * 1_000).requires_grad_()
    truths, grids = [torch.full((20, 30), -1), torch.randint(0, 4, (20, 30))], [(2, 3), (3, 2)]
    expected, expected_gradient = plain(rows.detach(), truths, grids, 4)
    with PixelCrossEntropy(CPU) as loss:
        found = loss(rows, [Labels.of(truth, 4, grid) for truth, grid in zip(truths, grids, strict=True)])
        found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert not rows.grad[:6].any()
    torch.testing.assert_close(rows.grad.double(), expected_gradient, rtol=0, atol=2e-4)


def test_threads_change_no_bit():
    torch.manual_seed(0)
    scores, outcomes = torch.randn(5 * 20, 6), []
    labels = [Labels.of(torch.randint(-1, 6, (40, 50)), 6, (4, 5)) for _ in range(5)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        rows = scores.clone().requires_grad_()
        with PixelCrossEntropy(CPU) as loss:
            assert (loss.pool is None) == (threads == 1)
            value = loss(rows, labels)
            value.backward()
        assert torch.get_num_threads() == threads
        outcomes.append((value.detach(), rows.grad))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


@pytest.mark.parametrize("patches, pixels", [(1, 7), (5, 5), (3, 40), (13, 6)])
def test_upsampling_is_interpolate(patches, pixels):
    values = torch.randn(1, 2, patches)
    expected = F.interpolate(values.double(), pixels, mode="linear", align_corners=False)
    torch.testing.assert_close((values @ upsampling(patches, pixels).T).double(), expected, rtol=0, atol=1e-6)
