"""The order of the rooms of hpseg: no import runs upwards, none in a circle. Modules that are named in tables and
imported by name (methods, data sets, verbs) are no imports."""

from __future__ import annotations

import pytest

import hpseg
from tests.imports import circle, imports_of

# From the bottom up. A room imports from its own and from those in the lines above, never from one beside it.
ORDER = [
    {"assets", "run"},
    {"runtime"},  # ranks and interruption end a run by the errors of `run`
    {"data", "models"},
    {"features"},
    {"methods"},
    {"inference"},  # its heads come from methods
    {"evaluation"},
    {"training"},  # previews and selection look through inference and evaluation
    {"interop", "pretraining"},
    {"demo"},
    {"cli"},
    {"__main__", "hpseg"},  # the public names
]
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
METHODS = {"hp", "stego", "dgcl", "lookbeyond", "fs4"}


def room_of(module):
    return module.split(".")[1] if "." in module else module


def test_every_room_has_its_place():
    assert {room_of(module) for module in imports_of("hpseg")} == set(RANKS)


def test_no_room_hides_a_public_name():
    """Importing hpseg.<room> sets hpseg's attribute of that name to the package."""
    assert not set(RANKS) & set(hpseg.__all__)


def test_no_import_runs_upwards():
    upwards = [
        f"{module} imports {name}"
        for module, names in imports_of("hpseg").items()
        for name in names
        if room_of(name) != room_of(module) and RANKS[room_of(name)] >= RANKS[room_of(module)]
    ]
    assert upwards == []


@pytest.mark.parametrize("package", ["hpseg", "benchmarks"])
def test_no_imports_run_in_a_circle(package):
    imports = imports_of(package)
    assert len(imports) > 15 and sum(map(len, imports.values())) > 30  # they are read at all
    assert circle(imports) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


def test_a_method_is_imported_by_its_own_modules_alone():
    def method_of(module):
        part = module.removeprefix("hpseg.methods.").split(".")[0]
        return part if module.startswith("hpseg.methods.") and part in METHODS else None

    for module, names in imports_of("hpseg").items():
        assert {method_of(name) for name in names} <= {None, method_of(module)}, module
