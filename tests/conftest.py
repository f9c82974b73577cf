"""Shared fixtures: the backends and devices that this machine can run."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tests import poison

# The tests are small and run side by side; thread counts are varied where they matter. .ci/sanitize wants several.
torch.set_num_threads(int(os.environ.get("HPKERNELS_TEST_THREADS", "1")))
# At its first backward pass torch decides whether autograd needs threads of its own. The op checks register devices
# that make it want some, and then no forked child can run a backward pass. So the first one is before any test.
torch.ones(1, requires_grad=True).sum().backward()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device the operator tests run on")
    parser.addoption("--backend", help="of the tests that every backend runs, those of this one only")
    parser.addoption(
        "--way", help="of the ways to run an op, those that begin so: cpu, cpu-avx2, host, interpreter, gpu"
    )
    parser.addoption("--part", help="I/N: of the tests the Ith of N parts")
    parser.addoption("--poison", action="store_true", help="fill all fresh memory with NaN: reads of unset memory show")


def pytest_configure(config):
    if config.getoption("--poison"):
        poison.fill()
    if config.getoption("--way") == "interpreter":
        assert "triton" not in sys.modules, "the interpreter has to be asked for before triton is imported"
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--part"):
        part, parts = map(int, config.getoption("--part").split("/"))
        kept = items[part - 1 :: parts]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


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


@pytest.fixture
def poisoned_memory():
    """What a kernel does not write shows: as under --poison, for one test."""
    with poison.filled():
        yield


@pytest.fixture
def same_for_all_threads():
    """check(function): the tensors that it returns have the same bits for any number of threads."""
    before = torch.get_num_threads()

    def check(function, counts=(1, 2, 3, 5)):
        first, *others = [_with_threads(count, function) for count in counts]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    yield check
    torch.set_num_threads(before)


def _with_threads(count, function):
    torch.set_num_threads(count)
    return list(function())


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
