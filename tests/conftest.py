"""Shared fixtures: the backends and devices that this machine can run."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # the tests are small and run side by side; thread counts are varied where they matter


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device the operator tests run on")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def pytest_generate_tests(metafunc):
    """`backend`: every backend that takes tensors on the device under test."""
    if "backend" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("--device") == "cuda"
        metafunc.parametrize("backend", ("reference", "triton") if on_gpu else ("reference", "cpu"))


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
