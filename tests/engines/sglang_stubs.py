"""Packages that SGLang imports and this machine does not have or need: kernels for GPUs, media, grammars.

`install()` lets them be imported; what is taken from them are objects that can be called, subclassed and looked into,
and do nothing. What a test computes must not come from here: `sgl_kernel` and the like have no results.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

NAMES = (
    *("IPython", "cuda", "cutlass", "decord", "flashinfer", "gguf", "helion", "kernels", "llguidance", "modelscope"),
    *("outlines", "quack", "sgl_deep_gemm", "sgl_kernel", "smg_grpc_servicer", "soundfile", "tilelang", "timm"),
    *("tokenspeed_mla", "torch_memory_saver", "torchao", "torchaudio", "torchvision", "tvm_ffi", "xgrammar"),
    *("av", "blobfile", "datasets"),
)


class Anything:
    """Whatever it is asked for; as a decorator it gives the function back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    def __or__(self, other: Any) -> type:
        return object

    __ror__ = __or__

    @classmethod
    def __get_pydantic_core_schema__(cls, *args: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.split(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
        module.__version__ = "99.0"  # newer than whatever is asked for


def install() -> None:
    """From now on the packages can be imported."""
    sys.meta_path.insert(0, _Finder())
