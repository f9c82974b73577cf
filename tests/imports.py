"""Which module of a package imports which, read from the sources: for the tests of the rules on imports.

A module stands for its file alone, so that a package is its `__init__.py`; that Python runs the packages above a module
first is no import here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Import(NamedTuple):
    module: str  # the one that imports
    target: str  # a module, of the same package or another
    line: int
    lazy: bool  # inside of a function
    for_types: bool  # under `if TYPE_CHECKING:`, so never run

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: imports {self.target}"


def modules(package: str) -> dict[str, Path]:
    """The modules of a package at the top level of the repository by name, compiled ones without a source left out."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read(package: str, compiled: Iterable[str] = ()) -> list[Import]:
    """All imports of the package's modules, wherever they stand. compiled: names of its modules without a source."""
    known = modules(package)
    names = {*known, *compiled}
    return [entry for module, path in known.items() for entry in _of_module(module, path, names)]


def circles(imports: Iterable[Import]) -> list[list[str]]:
    """The sets of modules that reach each other by imports, lazy ones included, those for types alone left out."""
    targets: dict[str, set[str]] = {}
    for entry in imports:
        if not entry.for_types:
            targets.setdefault(entry.module, set()).add(entry.target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(targets.get(start, ()))
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += targets.get(module, ())
        return seen

    reach = {module: reached(module) for module in targets}
    found = {
        tuple(sorted({module, *(other for other in ahead if module in reach.get(other, ()))}))
        for module, ahead in reach.items()
        if module in ahead
    }
    return [list(circle) for circle in sorted(found)]


def upwards(imports: Iterable[Import], tiers: list[list[str]]) -> list[str]:
    """The imports that go up, or aside into another room: a module may import from its own room and from lower tiers.

    tiers: rooms from the lowest tier to the highest. A room is a module with all below it; the longest name that fits
    a module is its room. Imports of what is in no room are not judged, modules that import and are in none are named.
    """
    tier_of = {room: tier for tier, rooms in enumerate(tiers) for room in rooms}

    def room(module: str) -> str | None:
        fitting = [name for name in tier_of if module == name or module.startswith(f"{name}.")]
        return max(fitting, key=len, default=None)

    said = []
    for entry in imports:
        own, other = room(entry.module), room(entry.target)
        if own is None:
            said.append(f"{entry.module} is in no room")
        elif other is not None and own != other and tier_of[other] >= tier_of[own]:
            said.append(str(entry))
    return sorted(set(said))


def _of_module(module: str, path: Path, known: set[str]) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            name = f"{base}.{alias.name}"
            yield name if name in known else base

    def walk(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for target in targets(node):
                yield Import(module, target, node.lineno, lazy, for_types)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, inside, True)
            for child in node.orelse:
                yield from walk(child, inside, for_types)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, for_types)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False, False)
