"""Shared fixtures: the backends and devices that this machine can run."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from hpkernels import dispatch

# The tests are small and run side by side; thread counts are varied where they matter. .ci/sanitize wants several.
torch.set_num_threads(int(os.environ.get("HPKERNELS_TEST_THREADS", "1")))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device the operator tests run on")
    parser.addoption("--backend", help="of the tests that every backend runs, those of this one only")
    parser.addoption("--poison", action="store_true", help="fill all fresh memory with NaN: reads of unset memory show")


def pytest_configure(config):
    if config.getoption("--poison"):
        torch.use_deterministic_algorithms(True, warn_only=True)  # under which torch.empty is filled
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def pytest_generate_tests(metafunc):
    """`backend`: every backend that takes tensors on the device under test."""
    if "backend" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("--device") == "cuda"
        backends = ("reference", "triton") if on_gpu else ("reference", "cpu")
        only = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", (only,) if only else backends)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(request):
    """Scratch memory of our own, which tests may have switched back."""
    if request.config.getoption("--poison") and dispatch.MISSING["cpu"] is None:
        importlib.import_module("hpkernels._cpu").poison_memory(True)


def pytest_terminal_summary(terminalreporter):
    """How much was tried by the tests that count it (record_property("tally", (what, n)))."""
    counts = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "tally":
                what, n = value
                counts[what] = counts.get(what, 0) + n
    if counts:
        terminalreporter.section("tried")
        for what, n in sorted(counts.items()):
            terminalreporter.line(f"{n:>8,} {what}")
