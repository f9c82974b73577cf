"""Profiles of the property tests, the kernels they are about, and how many cases were tried.

By default a few cases of each property, always the same ones. `pytest tests/properties --hypothesis-profile=long` tries
many, other ones each time; a failure prints the case. Under TRITON_INTERPRET=1 the kernels are Triton's.
"""

from __future__ import annotations

import hypothesis
import pytest

from tests.ops.cuda_on_host import library, shim  # noqa: F401  (fixtures)
from tests.properties import cases

COMMON = dict(deadline=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("few", max_examples=10, derandomize=True, database=None, **COMMON)
hypothesis.settings.register_profile("short", max_examples=20, derandomize=True, database=None, **COMMON)
hypothesis.settings.register_profile("long", max_examples=300, **COMMON)


def pytest_configure(config):
    if not config.getoption("--hypothesis-profile", None):
        hypothesis.settings.load_profile("short")


@pytest.fixture(scope="module")
def kernels(request):
    """The kernels of `cases.tries`, made ready to run."""
    if request.param is cases.ON_HOST:
        request.getfixturevalue("shim")
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = cases.tried.copy()
    try:
        return (yield)
    finally:
        for name, count in (cases.tried - before).items():
            item.user_properties.append(("tally", (f"cases of properties, {name} kernels", count)))
