"""Looking up what an integration holds on to: in the running engine, or in its files without importing it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def missing_hooks(hooks: Sequence[str]) -> list[str]:
    """Those of the hooks ("module:Class.attribute") that the installed engine does not have; imports their modules.

    A module that cannot be imported is missing whatever it raises: an engine may be broken in its own way.
    """
    return [hook for hook in hooks if not _is_there(hook)]


def _is_there(hook: str) -> bool:
    module, _, path = hook.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
    except Exception:
        return False
    return True


def missing_in_files(hooks: Sequence[str]) -> list[str]:
    """As `missing_hooks`, from the engine's source files alone: nothing of the engine is run."""
    return [hook for hook in hooks if not _is_written(hook)]


def _is_written(hook: str) -> bool:
    module, _, path = hook.partition(":")
    source = _source_of(module)
    if source is None:
        return False
    try:
        body: Sequence[ast.stmt] = ast.parse(source.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    for name in path.split("."):
        found = [statement for bound, statement in _bindings(body) if bound == name]
        if not found:
            return False
        body = getattr(found[-1], "body", []) if isinstance(found[-1], ast.ClassDef) else []
    return True


def _source_of(module: str) -> Path | None:
    """The file of a module, found below its top-level package, which is looked for and not imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(folder, *rest)
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _bindings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that statements bind, also below if, try and with."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name, statement
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias in statement.names:
                yield alias.asname or alias.name.partition(".")[0], statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                stored = (node for node in ast.walk(target) if isinstance(node, ast.Name))
                yield from ((name.id, statement) for name in stored if isinstance(name.ctx, ast.Store))  # not x of x.y
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _bindings(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from _bindings(handler.body)
