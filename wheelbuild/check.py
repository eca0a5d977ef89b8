"""What a library must show before it goes into the wheel; each refusal is one sentence and fails the build.

It holds machine code for every arch and no PTX, the MMA of each arch in a main loop within the limits of
ci/thresholds.toml, block-scaled MMAs that read what they should, and no spill; ptxas gave up nothing, and compiling it
cost no more than allowed. What it brings when it is loaded is checked by load.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wheelbuild import REFUSED, ROOT, BuildError
from wheelbuild.block_scaled import check_block_scaled
from wheelbuild.emulation import check_emulated_tile
from wheelbuild.machine_code import (
    Code,
    Resources,
    has_ptx,
    parse_ptxas,
    performance_losses,
    read_sass,
    undefined_symbols,
)
from wheelbuild.main_loop import MainLoop, find_main_loop
from wheelbuild.thresholds import THRESHOLDS

LOCAL_MEMORY = ("LDL", "STL")


def check_archs(library: str, code: Mapping[str, Code], archs: Sequence[str]) -> None:
    """Machine code for exactly these archs, and no kernel that two of them share."""
    if sorted(code) != sorted(archs):
        has, wanted = (", ".join(f"sm_{arch}" for arch in sorted(names)) for names in (code, archs))
        raise BuildError(f"{library} has machine code for {has or 'no arch'}, expected {wanted}")


def check_kernel_names(library: str, code: Mapping[str, Code]) -> None:
    """A kernel's name on one arch only: objects that were compiled per arch are linked into one library."""
    owner: dict[str, str] = {}
    for arch in code:
        for kernel in sorted(code[arch].kernels):
            other = owner.setdefault(kernel, arch)
            if other != arch:
                raise BuildError(
                    f"{library}: sm_{other} and sm_{arch} share the kernel name {kernel}; the linker would keep one "
                    "host launcher for both, so each arch's kernel needs a type or namespace of its own"
                )


def check_memory(library: str, code: Mapping[str, Code], resources: Sequence[Resources]) -> None:
    """ptxas's account of every arch, without a spill, and no local memory in the machine code."""
    for arch in code:
        kernels = [used for used in resources if used.arch == arch]
        if not kernels:
            raise BuildError(f"{library} on sm_{arch}: ptxas gave no account of registers and spills")
        for used in kernels:
            if used.spill_store_bytes or used.spill_load_bytes:
                raise BuildError(
                    f"{library} on sm_{arch}: {used.registers} registers are not enough, {used.spill_store_bytes} "
                    f"bytes of spill stores and {used.spill_load_bytes} of loads, none allowed"
                )
        for opcode in LOCAL_MEMORY:
            if count := code[arch].count(opcode):
                raise BuildError(
                    f"{library} on sm_{arch}: {count} {opcode}, which is local memory, none allowed; an array that is "
                    "indexed at run time lives there"
                )


def check_kernels(library: str, arch: str, code: Code, functions: Mapping[str, str]) -> None:
    """One kernel of each of these templates, by pair of formats, and none besides."""
    if not code.has_each_once(functions):
        expected = " and ".join(f"{function} of {pair}" for pair, function in functions.items())
        raise BuildError(
            f"{library} on sm_{arch}: expected {expected}, once and alone, got "
            f"{', '.join(sorted(code.kernels)) or 'no kernels'}"
        )


def check_main_loop(where: str, code: Code, expect: Mapping[str, Any]) -> MainLoop:
    """The loop around the MMA of a kernel: there is one, it holds every MMA, loads activations by LDSM and weights by
    LDS as wide as can be, and is short enough.

    `expect`: `opcode`; `mma_per_step`, `matrices_per_step` of activations, `words_per_step` of weights in a lane: what
    one step of K takes; `words_per_load`, how many words an LDS brings; `variants` as find_main_loop has it;
    `limit`, instructions per MMA or None.
    """
    opcode = expect["opcode"]
    if not code.count(opcode):
        raise BuildError(f"{where}: no {opcode} among {code.counts()['total']} instructions")
    if waterfalls := code.waterfalls(opcode):
        raise BuildError(
            f"{where}: {waterfalls} loops over the lanes of a warp around {opcode}; an operand that the instruction "
            "wants uniform (the scale selector) is not a constant"
        )
    (kernel,) = code.kernels.values()
    loop, outside = find_main_loop(kernel, opcode, variants=expect["variants"])
    if outside:
        raise BuildError(f"{where}: {outside} of {code.count(opcode)} {opcode} are in no loop, expected one around all")
    if loop is None:
        raise BuildError(f"{where}: every loop around {opcode} reads global memory, expected one that does not")

    def needed(per_step: int) -> int:
        return -(-loop.mma * per_step // int(expect["mma_per_step"]))

    if loop.ldsm_matrices < (wanted := needed(expect["matrices_per_step"])):
        raise BuildError(
            f"{where}: LDSM loads {loop.ldsm_matrices} matrices for {loop.mma} {opcode} in the main loop, which need "
            f"{wanted} of activations; another instruction loads the rest"
        )
    wide = expect["words_per_load"]
    loaded = sum(count * words for count, words in zip(loop.lds, (1, 2, 4), strict=True) if words >= wide)
    if loaded < (wanted := needed(expect["words_per_step"])):
        raise BuildError(
            f"{where}: LDS of {wide * 32} bits load {loaded} words for {loop.mma} {opcode} in the main loop, which "
            f"need {wanted} of weights; narrower loads bring the rest"
        )
    limit = expect["limit"]
    if limit is not None and loop.instructions_per_mma > limit:
        raise BuildError(
            f"{where}: {loop.instructions_per_mma} instructions per {opcode} in the main loop ({loop.instructions} for "
            f"{loop.mma}), at most {limit} allowed ({THRESHOLDS})"
        )
    return loop


def check_compiling(library: str, records: Mapping[str, Mapping[str, Any]], limits: Mapping[str, float]) -> None:
    """What each compilation cost in memory, and what ptxas said that it gave up.

    Time is reported and not limited: it says as much of the machine as of the code.
    """
    units = {"peak_mb": "MB"}
    for name, record in records.items():
        if losses := performance_losses(record["output"]):
            raise BuildError(f"{library}: ptxas gave something up when compiling {name}: {losses[0]}")
        for key, limit in limits.items():
            if record[key] > limit:
                raise BuildError(
                    f"{library}: compiling {name} took {record[key]} {units[key]}, at most {limit} allowed "
                    f"({THRESHOLDS})"
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
    archs: Sequence[str],
    expect: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    cuobjdump: Path,
) -> dict[str, Any]:
    """Every check of one library's code, and what they saw, for the report; BuildError for the first failure.

    `records` are wheelbuild.job's, by what was compiled; `expect` has `compile` limits, and for a tile `main_loop` and
    `block_scaled`, by arch and pair of formats, or `emulated` in their place, by pair.
    """
    name = library.name
    check_compiling(name, records, expect["compile"])
    code = read_sass(cuobjdump, library)
    check_archs(name, code, archs)
    if "main_loop" in expect:
        check_kernel_names(name, code)
    resources = [kernel for record in records.values() for kernel in parse_ptxas(record["output"])]
    emulated = check_emulated_tile(name, code, expect["emulated"]) if "emulated" in expect else None
    if emulated is None:
        check_memory(name, code, resources)
    loops: dict[str, dict[str, Any]] = {}
    kernels: dict[str, dict[str, Any]] = {}
    for arch, of_pairs in expect.get("main_loop", {}).items():
        check_kernels(name, arch, code[arch], {pair: want["function"] for pair, want in of_pairs.items()})
        for pair, want in of_pairs.items():
            own = code[arch].of(want["function"], pair)
            loop = check_main_loop(f"{name} on sm_{arch}, {pair}", own, want)
            loops.setdefault(arch, {})[pair] = loop.report()
            kernels.setdefault(arch, {})[pair] = own.counts()
    block_scaled = {
        arch: {
            pair: check_block_scaled(name, arch, code[arch].of(expect["main_loop"][arch][pair]["function"], pair), want)
            for pair, want in of_pairs.items()
        }
        for arch, of_pairs in expect.get("block_scaled", {}).items()
    }
    if called := undefined_symbols(cuobjdump, library):
        raise BuildError(
            f"{name} calls {called[0]}, which only the driver has; ptxas puts such calls where it cannot prove that an "
            "instruction is used as the hardware wants it"
        )
    if has_ptx(cuobjdump, library):
        raise BuildError(f"{name} holds PTX, which a driver would compile on loading it; expected none")
    environment = Path(sys.prefix)  # of a virtual environment; the system's own prefix is everybody's
    check_paths(library, [ROOT] if sys.prefix == sys.base_prefix else [ROOT, environment])
    data = library.read_bytes()
    return {
        "file": f"_ext/{name}",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "instructions": {arch: code[arch].counts() for arch in archs},
        "kernel_instructions": kernels,
        "main_loop": loops,
        "block_scaled": block_scaled,
        **({"emulated": emulated} if emulated else {}),
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
    parser.add_argument("--cuobjdump", type=Path, required=True)
    parser.add_argument("--archs", required=True)
    parser.add_argument("--expect", type=json.loads, required=True)
    parser.add_argument("--record", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        seen = check_library(
            library=args.library,
            archs=args.archs.split(","),
            expect=args.expect,
            records={
                path.name.removesuffix(".o.json"): json.loads(path.read_text(encoding="utf-8")) for path in args.record
            },
            cuobjdump=args.cuobjdump,
        )
    except BuildError as error:
        print(f"{REFUSED}{error}")
        return 1
    args.output.write_text(json.dumps(seen), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
