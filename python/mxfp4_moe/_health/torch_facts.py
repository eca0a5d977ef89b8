"""What torch, the CUDA runtime and the wheel's libraries say when they are loaded: a program in a process of its own.

Loading is where a broken install crashes or hangs, so the doctor does not do it itself. One line of JSON per event, so
that what was found before a crash is not lost:

    {"torch": {...}}   {"cudart": {...}}   {"gpus": [names], "gpu_error": ""}
    {"loading": module}   {"loaded": module, "error": ""}   {"end": true}
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .._install.troubles import one_line, words
from .child import channel

Send = Callable[[dict[str, Any]], None]


def mapped(soname: str) -> str:
    """The file under this name that the process has loaded; empty when it has none."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if path.rpartition("/")[2].startswith(soname):
                return path
    return ""


def cudart_facts(soname: str) -> dict[str, Any]:
    """The CUDA runtime that a library which needs `soname` gets here: its file and version, or why there is none."""
    facts: dict[str, Any] = {"soname": soname, "path": "", "version": "", "error": ""}
    try:
        library = ctypes.CDLL(soname)
        number = ctypes.c_int(0)
        library.cudaRuntimeGetVersion(ctypes.byref(number))
        facts["version"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
        facts["path"] = mapped(soname)
    except (OSError, AttributeError) as error:
        facts["error"] = str(error)
    return facts


def torch_facts(torch: Any) -> dict[str, Any]:
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "hip": getattr(torch.version, "hip", None) or "",
        "path": str(getattr(torch, "__file__", "")),
        "cudart": mapped("libcudart"),
    }


def gpu_facts(torch: Any) -> dict[str, Any]:
    """The GPUs that torch sees, or in its words why it sees none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return {"gpus": [], "gpu_error": "; ".join(one_line(str(warning.message)) for warning in caught)}
    return {"gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())], "gpu_error": ""}


def look(soname: str, modules: Sequence[str], send: Send) -> None:
    """Sends what is here, in the order in which a program that uses the wheel would meet it."""
    torch = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch = importlib.import_module("torch")
        facts = torch_facts(torch)
    except BaseException as error:  # a broken torch raises whatever it likes, and may even exit
        torch, facts = None, {"error": words(error)}
    send({"torch": facts})
    if soname:
        send({"cudart": cudart_facts(soname)})
    if torch is None or not facts["cuda"]:
        return
    try:
        send(gpu_facts(torch))
    except Exception as error:
        send({"gpus": [], "gpu_error": words(error)})
    for module in modules:
        send({"loading": module})
        try:
            importlib.import_module(f"mxfp4_moe._ext.{module}")
            send({"loaded": module, "error": ""})
        except Exception as error:
            send({"loaded": module, "error": str(error)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soname", default="", help="the CUDA runtime library that the wheel needs")
    parser.add_argument("modules", nargs="*", help="extensions to load, whole ones")
    arguments = parser.parse_args()
    messages = channel()

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    look(arguments.soname, arguments.modules, send)
    send({"end": True})
