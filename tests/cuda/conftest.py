"""The modules hpkernels.ops.<op>.cuda on the kernels compiled for the host."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from tests.ops.cuda_on_host import library, shim  # noqa: F401  (fixtures)


def _module_of(op: str):
    @pytest.fixture(scope="module")
    def module(shim) -> ModuleType:  # noqa: F811
        return importlib.import_module(f"hpkernels.ops.{op}.cuda")

    return module


search, contrastive, group_lse = map(_module_of, ("similarity_search", "contrastive", "group_lse"))
cluster_assign, local_mix, pair_bits = map(_module_of, ("cluster_assign", "local_mix", "pair_bits"))
