"""Which modules of a package import which, read from their source: at the top, in functions, and for types alone."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def name_of(file: Path) -> str:
    """The module in a file of the repository."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(package: str) -> dict[str, set[str]]:
    """module -> the modules of the same package that it imports; those named in strings (importlib) are left out."""
    sources = {name_of(file): file for file in sorted((ROOT / package).rglob("*.py"))}
    return {
        module: {name for name in _names(file) if name in sources and name != module}
        for module, file in sources.items()
    }


def _names(file: Path) -> set[str]:
    """What a file imports: of `from a import b` both a.b and, unless that is a module, a."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in turn, the first of them once more at the end; none if there are none."""
    done, path = set(), []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for name in sorted(imports[module]):
            if found := visit(name):
                return found
        done.add(path.pop())
        return []

    return next((found for module in imports if (found := visit(module))), [])
