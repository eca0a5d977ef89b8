"""What the modules of a source tree import, read from their text: for the test of the rooms (cpu/test_rooms.py)."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported module of `importer`; `lazy` when it happens inside of a function."""

    importer: str
    imported: str  # the project's dotted name, or the first part of another library's
    lazy: bool
    line: int


def module_names(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package in `root`."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: Iterable[str]) -> Iterator[Import]:
    """Every import of a module but those for type checkers; `from .x import y` names x.y where that is a module."""
    known = set(modules)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def target(whole: str) -> str:
        return whole if whole in known else whole.partition(".")[0]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                for other in child.orelse:
                    yield from visit(ast.Module([other], []), lazy)
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, target(alias.name), lazy, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = package.split(".")
                    base = ".".join([*parts[: len(parts) - child.level + 1], *([base] if base else [])])
                for alias in child.names:
                    whole = f"{base}.{alias.name}"
                    yield Import(name, whole if whole in known else target(base), lazy, child.lineno)
            yield from visit(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def circle(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """Names that lead back to the first of them, which stands at both ends; empty without a circle."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in edges.get(name, ()):
            if found := search(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := search(name, []))), [])


def brings(name: str, edges: Mapping[str, Iterable[str]]) -> set[str]:
    """Everything that importing a module imports, with what that imports; `edges` without the lazy ones."""
    found: set[str] = set()
    left = [name]
    while left:
        for other in edges.get(left.pop(), ()):
            if other not in found:
                found.add(other)
                left.append(other)
    return found
