"""The rooms of hpseg: no import runs upwards, none in a circle, and a method is known by its name alone. Modules that
are named in tables (methods, data sets, verbs) and found by name are no imports."""

from __future__ import annotations

import pytest

import hpseg
from tests.imports import circles, modules, read, upwards

# From the lowest tier to the highest.
TIERS = [
    ["assets", "run"],
    ["runtime"],  # ranks and interruption end a run by the errors of `run`
    ["data", "models"],
    ["features"],
    ["methods"],
    ["inference"],  # its heads come from methods
    ["evaluation"],
    ["training"],  # previews and selection look through inference and evaluation
    ["interop", "pretraining", "reporting"],
    ["demo"],
    ["cli"],
]
ROOMS = [room for rooms in TIERS for room in rooms]
METHODS = {"hp", "stego", "dgcl", "lookbeyond", "fs4"}


def test_every_module_is_in_a_room():
    rooms = {module.split(".")[1] for module in modules("hpseg") if module not in ("hpseg", "hpseg.__main__")}
    assert rooms == set(ROOMS)


def test_no_room_hides_a_public_name():
    """Importing hpseg.<room> sets hpseg's attribute of that name to the package."""
    assert not set(ROOMS) & set(hpseg.__all__)


def test_no_import_runs_upwards():
    tiers = [[f"hpseg.{room}" for room in rooms] for rooms in TIERS]
    assert upwards(read("hpseg"), [*tiers, ["hpseg"]]) == []  # hpseg itself has the public names


@pytest.mark.parametrize("package", ["hpseg", "benchmarks"])
def test_no_imports_run_in_a_circle(package):
    imports = read(package)
    assert len(imports) > 100 and circles(imports) == []


def test_a_method_is_imported_by_its_own_modules_alone():
    def method_of(module):
        part = module.removeprefix("hpseg.methods.").split(".")[0]
        return part if module.startswith("hpseg.methods.") and part in METHODS else None

    assert [str(one) for one in read("hpseg") if method_of(one.target) not in (None, method_of(one.module))] == []
