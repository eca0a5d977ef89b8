"""What is installed: the package, the wheel and with what it was built. Nothing is examined, see `mxfp4-moe doctor`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import __version__
from .._install import wheel

HELP = "the installed wheel's version, archs and the versions it was built with"

_SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: argparse.Namespace) -> int:
    data = info_data()
    print(json.dumps(data, indent=1) if arguments.json else info_text(data))
    return 0


def info_data() -> dict[str, Any]:
    report = wheel.read_report() or {}
    return {
        "schema": _SCHEMA,
        "version": __version__,
        "path": str(wheel.PACKAGE),
        "profile": report.get("profile"),
        "pairs": report.get("pairs"),  # of formats, weights and activations
        "archs": list(wheel.built_archs()),
        "tiles": len(wheel.built_tiles()),
        **({"emulates": report["emulates"]} if "emulates" in report else {}),
        "built_with": report.get("built_with"),
    }


def info_text(data: dict[str, Any]) -> str:
    rows = {
        "version": data["version"],
        "path": data["path"],
        "profile": data["profile"] or "unknown: no build report",
        "archs": ", ".join(f"sm_{arch}" for arch in data["archs"]),
        "tiles": str(data["tiles"]),
    }
    if data["pairs"]:
        rows["computes"] = ", ".join(data["pairs"])
    if "emulates" in data:
        rows["emulates"] = wheel.emulation_words(data["archs"], data["emulates"]["on"])
    rows |= {f"built with {name}": str(version) for name, version in (data["built_with"] or {}).items()}
    width = max(map(len, rows))
    return "\n".join(["mxfp4-moe", *(f"  {name:<{width}}  {text}" for name, text in rows.items())])
