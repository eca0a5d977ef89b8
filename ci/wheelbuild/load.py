"""Loads one extension as a user's Python would, and tells what it brought.

`python -m wheelbuild.load LIBRARY MODULE CUDART` prints one line of JSON. Run in a process of its own: a library that
is broken may take the process with it, and torch's operator registry remembers.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import sys


def main(library: str, module: str, cudart: str) -> None:
    # A CUDA torch has the runtime library loaded before any extension; the torch we build with may be CPU only.
    ctypes.CDLL(cudart, mode=ctypes.RTLD_GLOBAL)
    import torch

    before = set(torch._C._dispatch_get_all_op_names())
    report: dict[str, object] = {"error": None, "facts": None, "entry": None}
    name = f"mxfp4_moe._ext.{module}"
    try:
        loader = importlib.machinery.ExtensionFileLoader(name, library)
        spec = importlib.util.spec_from_file_location(name, library, loader=loader)
        assert spec is not None
        extension = importlib.util.module_from_spec(spec)
        loader.exec_module(extension)
        report["facts"] = extension.facts() if hasattr(extension, "facts") else None
        report["entry"] = getattr(extension, "entry", None)
    except ImportError as error:
        report["error"] = str(error)
    names = set(torch._C._dispatch_get_all_op_names()) - before
    report["ops"] = sorted({op for op in names if op.startswith("mxfp4_moe::")})
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:4])
