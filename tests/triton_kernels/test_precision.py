"""fp32 products on the matrix units ("bf16x6"): an emulation in numpy against fp64 and against IEEE products.

The emulation does what Triton compiles it to: three bf16 parts of each operand, six products of them summed from the
smallest on within a step of the inner dimension, the step added to the running sum in fp32. The matrix unit is modelled
from below, after Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021: products are exact, aligned to the
largest magnitude of a sum of 16, cut off there without a guard bit, and the sum is cut off to fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.properties.cases import KINDS, Matrix

UNIT = 16  # products that a matrix unit adds at a time


def toward_zero(x: np.ndarray) -> np.ndarray:
    """fp64 numbers cut off to fp32."""
    nearest = x.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest).astype(np.float32)


def matrix_unit(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a b^T in fp32, UNIT products at a time."""
    for start in range(0, a.shape[1], UNIT):
        part = slice(start, start + UNIT)
        products = a[:, None, part].astype(np.float64) * b[None, :, part].astype(np.float64)
        terms = np.concatenate([products, total.astype(np.float64)[..., None]], -1)
        exponent = np.frexp(np.abs(terms).max(-1, keepdims=True))[1]
        grid = np.ldexp(1.0, exponent - 24)
        total = toward_zero((np.trunc(terms / grid) * grid).sum(-1))
    return total


def parts(x: np.ndarray) -> list[np.ndarray]:
    """Three bf16 numbers whose sum is x to 24 bits, largest first."""
    found = []
    for _ in range(3):
        found.append(torch.from_numpy(x).bfloat16().float().numpy())
        x = x - found[-1]
    return found


def bf16x6(a: np.ndarray, b: np.ndarray, step: int) -> np.ndarray:
    (a_1, a_2, a_3), (b_1, b_2, b_3) = parts(a), parts(b)
    total = np.zeros((len(a), len(b)), np.float32)
    for start in range(0, a.shape[1], step):
        inner = slice(start, start + step)
        of_step = np.zeros_like(total)
        for left, right in ((a_2, b_2), (a_3, b_1), (a_1, b_3), (a_2, b_1), (a_1, b_2), (a_1, b_1)):
            of_step = matrix_unit(left[:, inner], right[:, inner], of_step)
        total = total + of_step
    return total


def ieee(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One fused multiply-add after another, each rounded to nearest."""
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1]):
        total = (a[:, None, k].astype(np.float64) * b[None, :, k].astype(np.float64) + total).astype(np.float32)
    return total


def largest_error(product: Callable[..., np.ndarray], pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Largest |error| / sum_k |a_k b_k| of all products."""
    errors = []
    for a, b in pairs:
        exact, size = (f(a).astype(np.float64) @ f(b).astype(np.float64).T for f in (np.asarray, np.abs))
        errors.append((np.abs(product(a, b) - exact) / np.where(size == 0, 1.0, size)).max())
    return max(errors)


def inputs(kind: str, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the property suite draws: each kind against itself and against other rows of its kind."""
    pairs = []
    for seed in range(4):
        for spread in (0, 4):
            recipe = Matrix(24, width, kind, spread, seed=seed)
            a = recipe.tensor().numpy()
            pairs += [(a, a), (a, recipe.like(24, seed + 100).numpy())]
    return pairs


@pytest.mark.parametrize("width", [3, 16, 64, 384])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_most_twice_that_of_ieee_products(kind: str, width: int):
    pairs = inputs(kind, width)
    bound = 2 * largest_error(ieee, pairs)
    for step in (16, 32):
        assert largest_error(lambda a, b, step=step: bf16x6(a, b, step), pairs) <= bound


def test_a_single_product_is_good_to_two_units_in_the_last_place():
    """Of width 1 an IEEE product is correctly rounded; six products that are cut off cannot be."""
    pairs = [pair for kind in KINDS for pair in inputs(kind, 1)]
    assert largest_error(lambda a, b: bf16x6(a, b, 16), pairs) <= 2 * 2.0**-23


def test_the_emulation_sees_a_missing_product():
    """Without one of the six the error is several times that of IEEE products: the bound above means something."""

    def five(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        (a_1, a_2, a_3), (b_1, b_2, _) = parts(a), parts(b)
        total = np.zeros((len(a), len(b)), np.float32)
        for left, right in ((a_2, b_2), (a_3, b_1), (a_2, b_1), (a_1, b_2), (a_1, b_1)):
            total = matrix_unit(left, right, total)
        return total

    pairs = inputs("random", 16)
    assert largest_error(five, pairs) > 4 * largest_error(ieee, pairs)


def test_fp32_products_run_on_the_matrix_units_unless_ieee_is_asked_for(monkeypatch):
    pytest.importorskip("triton")
    from hpkernels.ops.common import triton as common

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    expected = {
        True: {"none": "bf16x6", "tf32": "bf16x6", "ieee": "ieee"},
        False: {"none": "ieee", "tf32": "tf32x3", "ieee": "ieee"},  # Triton 3.5, and the interpreter
    }
    try:
        for has, by_request in expected.items():
            monkeypatch.setattr(common, "HAS_BF16X6", has)
            for request, name in by_request.items():
                matmul.fp32_precision = request
                assert common.precision(torch.float32) == name
                assert common.precision(torch.bfloat16) == "ieee"  # and means nothing there
    finally:
        matmul.fp32_precision = before
