"""The kernels compiled for the host, as tests/ops has them."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from tests.ops.cuda_on_host import library, shim  # noqa: F401  (fixtures)


@pytest.fixture
def local_mix(shim) -> ModuleType:  # noqa: F811
    return importlib.import_module("hpkernels.ops.local_mix.cuda")
