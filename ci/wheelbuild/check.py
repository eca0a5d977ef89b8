"""What a library must show before it goes into the wheel; each refusal is one sentence and fails the build.

It loads, registers exactly its own operators, agrees with the proof in tiles.py, holds machine code for every arch and
no PTX, has the MMA of each arch, and spills nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wheelbuild import ROOT, BuildError
from wheelbuild.machine_code import Code, Resources, has_ptx, parse_ptxas, read_sass

REFUSED = "refused: "


def load_in_subprocess(library: Path, module: str, cudart: Path) -> dict[str, Any]:
    """What the library brings when loaded as `mxfp4_moe._ext.<module>`; BuildError when it cannot be."""
    python_path = os.pathsep.join(filter(None, [str(ROOT / "ci"), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "wheelbuild.load", str(library.resolve()), module, str(cudart)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": python_path},
    )
    if result.returncode != 0:
        words = (result.stderr or result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
        raise BuildError(f"{library.name} cannot be loaded: {words[-1]}")
    loaded: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return loaded


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
    for arch, wanted in expect["facts"].items():
        for key, value in wanted.items():
            actual = facts[arch].get(key)
            if actual != value:
                raise BuildError(
                    f"{library} on sm_{arch}: {key} is {actual} in the compiled tile and {value} in the proof of "
                    "tiles.py; csrc/tile/tile_shape.cuh and tiles.py must agree"
                )


def check_code(
    library: str,
    code: Mapping[str, Code],
    resources: Sequence[Resources],
    archs: Sequence[str],
    opcodes: Mapping[str, str],
    max_spill_bytes: Mapping[str, int],
) -> None:
    """Machine code for exactly these archs; for a tile also its MMA, its own kernels per arch, and hardly a spill."""
    if sorted(code) != sorted(archs):
        has, wanted = (", ".join(f"sm_{arch}" for arch in sorted(names)) for names in (code, archs))
        raise BuildError(f"{library} has machine code for {has or 'no arch'}, expected {wanted}")
    owner: dict[str, str] = {}
    for arch, opcode in opcodes.items():
        if not code[arch].count(opcode):
            raise BuildError(f"{library} on sm_{arch}: no {opcode} among {code[arch].counts()['total']} instructions")
        if waterfalls := code[arch].waterfalls(opcode):
            raise BuildError(
                f"{library} on sm_{arch}: {waterfalls} loops over the lanes of a warp around {opcode}; an operand that "
                "the instruction wants uniform (the scale selector) is not a constant"
            )
        for kernel in sorted(code[arch].kernels):
            other = owner.setdefault(kernel, arch)
            if other != arch:
                raise BuildError(
                    f"{library}: sm_{other} and sm_{arch} share the kernel name {kernel}; the linker would keep one "
                    "host launcher for both, so each arch's kernel needs a type or namespace of its own"
                )
    for arch, limit in max_spill_bytes.items():
        kernels = [used for used in resources if used.arch == arch]
        if not kernels:
            raise BuildError(f"{library} on sm_{arch}: ptxas gave no account of registers and spills")
        for used in kernels:
            if max(used.spill_store_bytes, used.spill_load_bytes) > limit:
                raise BuildError(
                    f"{library} on sm_{arch}: {used.registers} registers are not enough, {used.spill_store_bytes} "
                    f"bytes of spill stores and {used.spill_load_bytes} of loads, at most {limit} allowed"
                )


def check_paths(library: Path, folders: Sequence[Path]) -> None:
    """No folder of the machine that built it may be in a library: it would mislead, and differ from build to build."""
    data = library.read_bytes()
    for folder in folders:
        place = data.find(str(folder).encode() + b"/")
        if place >= 0:
            text = re.split(rb"[^\x20-\x7e]", data[place : place + 200])[0].decode()
            raise BuildError(f"{library.name} contains a path of the build machine: {text}")


def check_library(
    *,
    library: Path,
    module: str,
    archs: Sequence[str],
    expect: Mapping[str, Any],
    resources: Sequence[Resources],
    cudart: Path,
    cuobjdump: Path,
) -> dict[str, Any]:
    """Every check of one library, and what they saw, for the report; BuildError for the first failure."""
    loaded = load_in_subprocess(library, module, cudart)
    check_load(library.name, loaded, expect)
    code = read_sass(cuobjdump, library)
    check_code(library.name, code, resources, archs, expect.get("opcodes", {}), expect.get("max_spill_bytes", {}))
    if has_ptx(cuobjdump, library):
        raise BuildError(f"{library.name} holds PTX, which a driver would compile on loading it; expected none")
    environment = Path(sys.prefix)  # of a virtual environment; the system's own prefix is everybody's
    check_paths(library, [ROOT] if sys.prefix == sys.base_prefix else [ROOT, environment])
    data = library.read_bytes()
    return {
        "file": f"_ext/{library.name}",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "ops": loaded["ops"],
        "facts": loaded["facts"],
        "instructions": {arch: code[arch].counts() for arch in archs},
        "kernels": {
            arch: [
                {
                    "name": kernel.kernel,
                    "registers": kernel.registers,
                    "stack_bytes": kernel.stack_bytes,
                    "spill_store_bytes": kernel.spill_store_bytes,
                    "spill_load_bytes": kernel.spill_load_bytes,
                }
                for kernel in resources
                if kernel.arch == arch
            ]
            for arch in archs
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--cudart", type=Path, required=True)
    parser.add_argument("--cuobjdump", type=Path, required=True)
    parser.add_argument("--archs", required=True)
    parser.add_argument("--expect", type=json.loads, required=True)
    parser.add_argument("--record", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    texts = [json.loads(record.read_text(encoding="utf-8"))["output"] for record in args.record]
    try:
        seen = check_library(
            library=args.library,
            module=args.module,
            archs=args.archs.split(","),
            expect=args.expect,
            resources=[kernel for text in texts for kernel in parse_ptxas(text)],
            cudart=args.cudart,
            cuobjdump=args.cuobjdump,
        )
    except BuildError as error:
        print(f"{REFUSED}{error}")
        return 1
    args.output.write_text(json.dumps(seen), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
