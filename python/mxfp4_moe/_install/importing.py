"""What importing a module of the package says where torch is missing, broken or too old: one sentence, not torch's own.

torch is imported by whichever module is imported first, of which there are many, and a broken torch raises whatever it
likes: ImportError, OSError, ValueError of its own. So the package's modules are executed by a loader that looks at what
they raise. Standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FrameType, ModuleType

from . import troubles, wheel

PACKAGE = __name__.partition(".")[0]


def explain(error: BaseException) -> None:
    """Raises an ImportError that says why, with the next step, where the error is about torch; returns otherwise."""
    if type(error) is ImportError and error.name == PACKAGE:
        return  # of a module that this one imports, and explained
    torch = sys.modules.get("torch")
    built_with = (wheel.read_report() or {}).get("built_with") or {}
    here = troubles.Versions(
        wheel_cuda=str(built_with.get("cuda", "")),
        torch_cuda=getattr(getattr(torch, "version", None), "cuda", None) or "",
        importing_torch=torch is None and _is_of_torch(error),
    )
    message = troubles.words(error)
    if trouble := troubles.recognize(message, here):
        means, remedy = trouble.words(here)
        sentence = f"{PACKAGE} cannot be used ({message}): {means}; {remedy}; {troubles.DOCTOR}"
        raise ImportError(sentence, name=PACKAGE) from error


def _is_of_torch(error: BaseException) -> bool:
    """Whether it was raised inside of torch, or by the search for it."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    return missing == "torch" or any(
        str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch" for frame in _frames(error)
    )


def _frames(error: BaseException) -> Iterator[FrameType]:
    place = error.__traceback__
    while place is not None:
        yield place.tb_frame
        place = place.tb_next


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except (Exception, SystemExit) as error:
            explain(error)
            raise


class _Finder:
    """Finds the package's modules as Python does, and has them loaded by `_Loader`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def watch() -> None:
    """From now on, importing a module of the package says what is wrong with torch, once."""
    if not any(finder is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder)
