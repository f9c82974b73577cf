"""One suite an op over every way to run it, with fresh memory full of NaN.

A test that asks for `kernels` runs once a way and gets the backend's functions of OP, the op folder its file names.
With `dtype` it runs for each of the way's dtypes, or of the file's DTYPES[backend]; with
@pytest.mark.cases("n, d", [...], cuda=[...]) for each case of the list and, on the backend named, for those of its own;
with @pytest.mark.only("cpu") on these backends or ways alone.
"""

from __future__ import annotations

import functools

import pytest

from hpkernels.ops.common import gpu
from tests.ops import ways
from tests.ops.cuda_on_host import library, shim  # noqa: F401  (fixtures)

all_ways = functools.cache(ways.all_ways)
# They import triton, which then is the interpreter or never is: test_interpreted.py starts a process that has it.
collect_ignore_glob = [] if ways.interpreting() else ["*/test_*_triton.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "cases(names, for_all, **of_backend): what a test of an op runs on")
    config.addinivalue_line("markers", "only(*names): of backends or ways that a test of an op runs on")


def pytest_generate_tests(metafunc):
    if not {"way", "kernels"} & set(metafunc.fixturenames):
        return
    only, given = (metafunc.definition.get_closest_marker(name) for name in ("only", "cases"))
    names = given.args[0].replace(" ", "").split(",") if given else []
    elsewhere = ",".join(mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")).replace(" ", "")
    of_dtype = "dtype" in metafunc.fixturenames and "dtype" not in [*names, *elsewhere.split(",")]
    begin = metafunc.config.getoption("--way") or ""
    rows = []
    for way in all_ways():
        if not way.name.startswith(begin) or (only and not {way.name, way.backend} & set(only.args)):
            continue
        missing = [pytest.mark.skip(reason=way.missing)] if way.missing else []
        for values, marks, label in _cases(given, names, way.backend):
            for dtype in _dtypes(metafunc.module, way) if of_dtype else (None,):
                whole = "-".join(part for part in (way.name, label, dtype and ways.label(dtype)) if part)
                row = (way, *values, *([dtype] if of_dtype else []))
                rows.append(pytest.param(*row, marks=[*missing, *marks], id=whole))
    metafunc.parametrize(["way", *names, *(["dtype"] if of_dtype else [])], rows)


def _dtypes(module, way):
    return getattr(module, "DTYPES", {}).get(way.backend, way.dtypes)


def _cases(given, names, backend):
    """(values, marks, label) of each, once."""
    cases = [*(given.args[1] if len(given.args) > 1 else ()), *given.kwargs.get(backend, ())] if given else [()]
    found = {}
    for case in cases:
        values, marks, label = case if hasattr(case, "marks") else (case if len(names) != 1 else (case,), (), None)
        label = label or "-".join(map(ways.label, values))
        found.setdefault(label, (values, marks, label))
    return found.values()


def pytest_collection_modifyitems(config, items):
    """Tests that none of this process's ways has are none of its tests."""
    has_no_way = [item for item in items if not isinstance(_way_of(item), (ways.Way, type(None)))]
    config.hook.pytest_deselected(items=has_no_way)
    items[:] = [item for item in items if item not in has_no_way]


def _way_of(item):
    return item.callspec.params.get("way") if hasattr(item, "callspec") else None


@pytest.fixture
def kernels(way, request, poisoned_memory):
    if way.backend == "cuda" and way.device == "cpu":
        request.getfixturevalue("shim")
    with way.open(request.module.OP) as functions:
        yield functions


@pytest.fixture
def processors(monkeypatch):
    """processors(n): pretend to be a GPU of so many. From 8 on the loops over tiles are split."""
    return lambda count: monkeypatch.setattr(gpu, "processor_count", lambda device: count)
