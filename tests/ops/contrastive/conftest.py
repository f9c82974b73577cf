"""The interpreter pays for programs: same code, smaller grids."""

import pytest

from tests.ops import ways


@pytest.fixture(autouse=ways.interpreting())
def _fewer_programs(monkeypatch):
    from hpkernels.ops.contrastive.triton import columns

    monkeypatch.setattr(columns, "_SUM_ITEMS", 16)
