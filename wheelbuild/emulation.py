"""The development build that runs SM12x's kernels on SM90, and how its wheels are kept from everybody.

MXFP4_MOE_EMULATE_SM12X=1 (ci/build-emulated.sh) compiles what the arch below compiles to, its stages, warps, containers
and selectors, as machine code of another, with the one instruction that the other lacks done in integers
(csrc/tile/sm12x/emulated_mma.cuh). The version says so, the build report, the doctor and every import; what makes,
audits or publishes a release refuses it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wheelbuild import BuildError
from wheelbuild.machine_code import Code

VARIABLE = "MXFP4_MOE_EMULATE_SM12X"
ARCH = "120f"  # whose code it is
ON = "90a"  # as whose machine code it is compiled
DEFINE = "-DMXFP4_MOE_EMULATES_SM12X"
VARIANT = "sm12x.emulated"  # of the version

_TENSOR_CORE = ("QMMA", "HMMA", "HGMMA", "QGMMA", "IMMA", "IGMMA", "OMMA")


def refuse_emulated(wheel: Path) -> None:
    """BuildError when the wheel is such a build, by its name or by its report, whatever it was renamed to."""
    with zipfile.ZipFile(wheel) as archive:
        reports = [name for name in archive.namelist() if name == "mxfp4_moe/build_report.json"]
        emulates = json.loads(archive.read(reports[0])).get("emulates") if reports else None
    if emulates or VARIANT in wheel.name:
        raise BuildError(
            f"{wheel.name} emulates sm_{ARCH} on sm_{ON} ({VARIABLE}): it is a development build, for tests alone, and "
            "is never released; ci/build-wheel.sh without that variable builds what is"
        )


def check_emulated_tile(
    library: str, code: Mapping[str, Code], expect: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, int]]:
    """What a tile's machine code must be instead of tensor cores' in a main loop within its limits.

    SM12x's kernels and no others, which bring operands by TMA and LDSM. One whose MMA the other arch lacks keeps the
    tensor cores idle, and calls the emulated instruction: so many times in each K tile (`mma_per_k_tile`), or in each
    of several that are unrolled; one whose MMA both have uses it. Spills are allowed: the function needs registers that
    the instruction does not.

    Args:
        expect: by pair of formats.

    Returns:
        By pair the calls and all instructions, for the report.

    Raises:
        BuildError: it is not.
    """
    kernels = code[ON].kernels
    functions = {pair: str(want["function"]) for pair, want in expect.items()}
    if not code[ON].has_each_once(functions):
        expected = _listed([f"{function} of {pair}" for pair, function in functions.items()])
        raise BuildError(
            f"{library} on sm_{ON}: expected {expected} alone, which sm_{ARCH} has, got {_listed(list(kernels))}"
        )
    return {
        pair: _check_kernel(f"{library} on sm_{ON}, {pair}", code[ON].of(functions[pair], pair), want)
        for pair, want in expect.items()
    }


def _check_kernel(where: str, code: Code, expect: Mapping[str, Any]) -> dict[str, int]:
    """`check_emulated_tile` of one kernel."""
    counts = {name: code.count(name) for name in (*_TENSOR_CORE, "UTMALDG", "LDSM", "USETMAXREG")}
    if not expect["mma_per_k_tile"]:
        if not counts["HMMA"]:
            raise BuildError(f"{where}: no HMMA in {expect['function']}, which both archs have")
        return {"calls": 0, "instructions": code.counts()["total"]}
    if used := [name for name in _TENSOR_CORE if counts[name]]:
        raise BuildError(f"{where}: {counts[used[0]]} {used[0]}, but the MMA is emulated and none allowed")
    # Lanes exchange their registers in the emulated MMA; others that are called divide.
    calls, each = code.calls_of_functions_with("SHFL"), expect["mma_per_k_tile"]
    if calls == 0 or calls % each:
        raise BuildError(
            f"{where}: {calls} calls of the emulated MMA, expected a multiple of {each}, those of a K tile"
        )
    for name in ("UTMALDG", "LDSM", *(("USETMAXREG",) if expect["moves_registers"] else ())):
        if not counts[name]:
            raise BuildError(f"{where}: no {name}, which the kernel has on sm_{ARCH}")
    return {"calls": calls, "instructions": code.counts()["total"]}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
