"""The rules of the house on imports: hpkernels stands on torch, its rooms on each other in one order, ops on no op."""

from __future__ import annotations

import sys

import pytest

from tests.imports import Import, circles, modules, read, upwards

COMPILED = ("hpkernels._cpu", "hpkernels._cuda")
OUTSIDE = {"numpy", "torch"} | sys.stdlib_module_names
TIERS = [
    ["hpkernels._version", "hpkernels.common", "hpkernels.dispatch", "hpkernels.tuning", *COMPILED],
    ["hpkernels.ops.common"],
    ["hpkernels.ops"],
    ["hpkernels.attention", "hpkernels.mixing", "hpkernels.pairs"],
    ["hpkernels.search"],
    ["hpkernels.clustering", "hpkernels.density", "hpkernels.mining"],
    ["hpkernels.losses"],
    ["hpkernels.info", "hpkernels.nn", "hpkernels.tune"],
    ["hpkernels"],
]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return read("hpkernels", COMPILED)


def test_no_circles(imports):
    assert circles(imports) == []


def test_no_import_goes_up(imports):
    assert upwards(imports, TIERS) == []


def test_every_room_of_the_table_is_there():
    there = {*modules("hpkernels"), *COMPILED}
    assert [room for tier in TIERS for room in tier if room not in there] == []


def test_an_op_imports_no_other_op(imports):
    def op(module: str) -> str:
        return ".".join(module.split(".")[:3])

    assert [
        str(entry) for entry in imports
        if entry.module.startswith("hpkernels.ops.") and entry.target.startswith("hpkernels.ops.")
        and op(entry.target) not in (op(entry.module), "hpkernels.ops.common")
    ] == []  # fmt: skip


def test_what_hpkernels_stands_on(imports):
    """torch, numpy and Python; Triton where its kernels are, which nothing else imports before a call needs it."""

    def of_triton(module: str) -> bool:
        return module.startswith("hpkernels.ops.") and "triton" in module.split(".")

    allowed = {"hpkernels", *OUTSIDE}
    for entry in imports:
        if of_triton(entry.module):
            continue
        lazily = {"triton"} if entry.lazy else set()
        assert entry.target.split(".")[0] in allowed | lazily, entry
        assert entry.lazy or not of_triton(entry.target), entry


def _import(module: str, target: str, for_types: bool = False) -> Import:
    return Import(module, target, 1, True, for_types)


def test_the_reader_finds_what_breaks_the_rules():
    ring = [_import("a", "b"), _import("b", "c.d"), _import("c.d", "a"), _import("e", "a")]
    assert circles(ring) == [["a", "b", "c.d"]]
    assert circles([_import("a", "b"), _import("b", "a", for_types=True)]) == []
    found = upwards(ring, [["a"], ["b", "e"], ["c"]])
    assert found == ["a, line 1: imports b", "b, line 1: imports c.d"]
    assert upwards([_import("c.d", "c.e"), _import("f", "a")], [["a"], ["c"]]) == ["f is in no room"]
