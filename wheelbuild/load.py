"""Loads every extension of a build as a user's Python would, and checks what each brings.

`python -m wheelbuild.load --expect '{"tile_x": {...}}' --cudart FILE --output FILE LIBRARY...` imports torch once and
loads each library in a fork of its own: a broken one may take its process with it, and torch's operator registry
remembers. Refusals are one sentence each.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wheelbuild import REFUSED, BuildError


def _proved_in(arch: str, pair: str) -> tuple[str, str]:
    """The source and the proof that must agree about a tile's kernel."""
    if arch.startswith("9"):
        return "csrc/tile/sm90/tile_shape.cuh", "tiles/bf16.py"
    if pair.endswith(("_bf16", "_fp16")):
        return "csrc/tile/sm12x/bf16_tile_shape.cuh", "tiles/bf16.py"
    return "csrc/tile/tile_shape.cuh", "tiles/proof.py"


def _compare(library: str, arch: str, pair: str, facts: object, wanted: Mapping[str, int]) -> None:
    source, proof = _proved_in(arch, pair)
    if not isinstance(facts, dict) or sorted(facts) != sorted(wanted):
        has = sorted(facts) if isinstance(facts, dict) else facts
        raise BuildError(
            f"{library} on sm_{arch}, {pair}: has the facts {has}, expected {sorted(wanted)}; "
            "csrc/tile/tile_op.cpp and tiles/proof.py must agree"
        )
    for key, value in wanted.items():
        if facts[key] != value:
            raise BuildError(
                f"{library} on sm_{arch}, {pair}: {key} is {facts[key]} in the compiled tile and {value} in the proof "
                f"of {proof}; {source} and {proof} must agree"
            )


def check_load(library: str, loaded: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    """The operators and facts of a loaded library against what its manifest row and the proof say."""
    ops = loaded["ops"]
    if "ops" in expect and ops and ops != expect["ops"]:
        raise BuildError(f"{library} registers {', '.join(ops)}, expected exactly {', '.join(expect['ops'])}")
    if loaded["error"]:
        raise BuildError(f"{library} cannot be loaded: {loaded['error']}")
    if not ops:
        raise BuildError(f"{library} registers no operator of mxfp4_moe")
    if "facts" not in expect:
        return
    if not loaded["entry"]:
        raise BuildError(f"{library} has no address in its attribute 'entry'")
    facts = loaded["facts"]
    if not isinstance(facts, dict) or sorted(facts) != sorted(expect["facts"]):
        has = sorted(facts) if isinstance(facts, dict) else facts
        raise BuildError(f"{library} has facts for archs {has}, expected {sorted(expect['facts'])}")
    for arch, of_pairs in expect["facts"].items():
        if not isinstance(facts[arch], dict) or sorted(facts[arch]) != sorted(of_pairs):
            raise BuildError(f"{library} on sm_{arch}: has facts for {facts[arch]}, expected pairs {sorted(of_pairs)}")
        for pair, wanted in of_pairs.items():
            _compare(library, arch, pair, facts[arch][pair], wanted)


def _load(library: Path, module: str) -> dict[str, Any]:
    """What the library registers and tells, in this process."""
    import torch

    before = set(torch._C._dispatch_get_all_op_names())
    loaded: dict[str, Any] = {"error": None, "facts": None, "entry": None}
    name = f"mxfp4_moe._ext.{module}"
    try:
        loader = importlib.machinery.ExtensionFileLoader(name, str(library.resolve()))
        spec = importlib.util.spec_from_file_location(name, library, loader=loader)
        assert spec is not None
        extension = importlib.util.module_from_spec(spec)
        loader.exec_module(extension)
        loaded["facts"] = extension.facts() if hasattr(extension, "facts") else None
        loaded["entry"] = getattr(extension, "entry", None)
    except ImportError as error:
        loaded["error"] = str(error)
    names = set(torch._C._dispatch_get_all_op_names()) - before
    loaded["ops"] = sorted(op for op in names if op.startswith("mxfp4_moe::"))
    return loaded


def load_in_fork(library: Path, module: str) -> dict[str, Any]:
    """What a library brings when loaded as `mxfp4_moe._ext.<module>`; `error` says why it cannot be."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(receive)
            with os.fdopen(send, "w") as stream:
                json.dump(_load(library, module), stream)
            status = 0
        finally:
            os._exit(status)  # the parent's clean-up is the parent's
    os.close(send)
    with os.fdopen(receive) as stream:
        text = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        loaded: dict[str, Any] = json.loads(text)
        return loaded
    ended = f"loading it ended the process with {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return {"error": ended, "facts": None, "entry": None, "ops": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expect", type=json.loads, required=True, help="per module what check_load expects")
    parser.add_argument("--cudart", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("libraries", type=Path, nargs="+")
    args = parser.parse_args()
    # A CUDA torch has the runtime library loaded before any extension; the torch we build with may be CPU only.
    ctypes.CDLL(str(args.cudart), mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401  here, so that the forks need not

    seen, refusals = {}, []
    for library in args.libraries:
        module = library.name.split(".")[0]
        try:
            loaded = load_in_fork(library, module)
            check_load(library.name, loaded, args.expect[module])
        except BuildError as error:
            refusals.append(str(error))
        else:
            seen[module] = {key: loaded[key] for key in ("ops", "facts")}
    for refusal in refusals:
        print(f"{REFUSED}{refusal}")
    if not refusals:
        args.output.write_text(json.dumps(seen), encoding="utf-8")
    return 1 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())
