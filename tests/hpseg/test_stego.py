"""The correspondence loss against the published code's stored numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hpseg.methods.stego import correspondence_loss, other_images, sample_points

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("name", ("pointwise", "stabilize"))
def test_loss_and_gradients_are_those_of_the_published_code(name):
    stored = np.load(GOLDEN / f"stego_{name}.npz")
    features = [torch.tensor(stored[f"features_{i}"]) for i in (1, 2)]
    codes = [torch.tensor(stored[f"code_{i}"]).requires_grad_() for i in (1, 2)]
    loss = correspondence_loss(*features, *codes, float(stored["shift"]), **json.loads(str(stored["meta"])))
    loss.backward()
    assert loss.item() == pytest.approx(float(stored["loss_mean"]), rel=1e-6)
    for code, i in zip(codes, (1, 2), strict=True):
        torch.testing.assert_close(code.grad, torch.tensor(stored[f"grad_{i}"]), rtol=1e-5, atol=1e-9)


def test_points_are_bilinear_with_the_corners_at_one():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[[-1.0, -1.0], [1.0, -1.0]], [[-1.0, 1.0], [0.0, 0.0]]]])
    assert sample_points(maps, points).flatten().tolist() == [0.0, 3.0, 8.0, 5.5]


def test_an_image_is_never_its_own_negative():
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 8):
        for _ in range(50):
            drawn = other_images(count, generator)
            assert (drawn != torch.arange(count)).all() and drawn.min() >= 0 and drawn.max() < count
