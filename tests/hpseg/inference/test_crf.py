"""The dense CRF against pydensecrf's stored outputs, and against the all-pairs sums it approximates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpseg.inference.crf import _Filter, dense_crf

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize("number", (0, 1))
def test_labels_are_those_of_pydensecrf(number):
    stored = np.load(GOLDEN / f"dense_crf_{number}.npz")
    bgr = torch.tensor(stored["image"]).flip(2).contiguous()
    marginals = dense_crf(bgr, torch.tensor(stored["probabilities"]))
    assert np.array_equal(marginals.argmax(0).numpy(), stored["labels"])
    # Where a pixel lies half-way between two lattice points the rounding decides: 30 pixels of the second image.
    differing = np.abs(marginals.numpy() - stored["marginals"]).max(0) > 1e-4
    assert differing.mean() < 0.002


def test_marginals_are_a_distribution():
    image = torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8)
    marginals = dense_crf(image, torch.rand(4, 7, 9))
    assert marginals.shape == (4, 7, 9) and (marginals >= 0).all()
    torch.testing.assert_close(marginals.sum(0), torch.ones(7, 9))


@pytest.mark.parametrize("dimensions", (2, 5))
def test_filter_is_close_to_the_gaussian_sum(dimensions):
    torch.manual_seed(0)
    features = torch.rand(400, dimensions) * 3
    q = torch.rand(400, 3)
    kernel = torch.exp(-0.5 * torch.cdist(features, features).square())
    degree = kernel.sum(1).rsqrt()
    exact = 2.0 * degree[:, None] * (kernel @ (degree[:, None] * q))
    found = _Filter(features, 2.0).add_to(torch.zeros_like(q), q)
    assert (found - exact).norm() < 0.05 * exact.norm()  # the lattice's own error: 0.012 and 0.033 were seen


def test_without_iterations_or_weights_the_probabilities_stay():
    image = torch.randint(0, 256, (5, 6, 3), dtype=torch.uint8)
    probabilities = torch.rand(3, 5, 6).softmax(0)
    for options in ({"iterations": 0}, {"gaussian_weight": 0.0, "bilateral_weight": 0.0}):
        torch.testing.assert_close(dense_crf(image, probabilities, **options), probabilities)


def test_one_pixel_and_one_class():
    assert dense_crf(torch.zeros(1, 1, 3, dtype=torch.uint8), torch.ones(1, 1, 1)).item() == 1.0


@pytest.mark.parametrize(
    "change, error",
    [
        ({"image": torch.zeros(4, 5, 3)}, "image: expected a uint8 tensor"),
        ({"image": torch.zeros(3, 4, 5, dtype=torch.uint8)}, "image: expected a uint8 tensor"),
        ({"probabilities": torch.ones(2, 5, 4)}, "probabilities: expected .K, 4, 5."),
        ({"probabilities": torch.full((2, 4, 5), torch.nan)}, "probabilities: expected finite"),
        ({"probabilities": torch.ones(2, 4, 5, dtype=torch.int64)}, "probabilities: expected a floating"),
        ({"iterations": -1}, "iterations: expected"),
    ],
)
def test_errors_name_the_argument(change, error):
    arguments = {"image": torch.zeros(4, 5, 3, dtype=torch.uint8), "probabilities": torch.ones(2, 4, 5)} | change
    image, probabilities = arguments.pop("image"), arguments.pop("probabilities")
    with pytest.raises((TypeError, ValueError), match=error):
        dense_crf(image, probabilities, **arguments)
