"""The interpreter pays for programs: same code, smaller grids."""

import pytest

from tests.ops import ways


@pytest.fixture(autouse=ways.interpreting())
def _fewer_programs(monkeypatch):
    from hpkernels.ops.contrastive.triton import sparse_grad

    monkeypatch.setattr(sparse_grad, "_COLUMN_SPLITS", 2)
    monkeypatch.setattr(sparse_grad, "_SUM_PROGRAMS", 16)
