"""A healthy environment, and changes to it, for the tests of the doctor."""

from __future__ import annotations

import dataclasses
from typing import Any

from mxfp4_moe._health import checks, remembered
from mxfp4_moe._health.environment import (
    CudartFacts,
    DriverFacts,
    Environment,
    Library,
    PythonFacts,
    Remembered,
    TorchFacts,
    TunedTable,
    WheelFacts,
)
from mxfp4_moe._health.findings import Finding, Level
from mxfp4_moe._install.driver import Gpu
from mxfp4_moe.tiles import load_manifest

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR
FIRST, SECOND = load_manifest().tiles[:2]
H200 = Gpu(index=0, name="NVIDIA H200", capability=(9, 0))
SPARK = Gpu(index=1, name="NVIDIA GB10", capability=(12, 1))
OLD_GPU = Gpu(index=2, name="NVIDIA GeForce RTX 4090", capability=(8, 9))
MODULES = ("moe", FIRST.module, SECOND.module)
RESULT = remembered.Result(passed=26, tiles=26, driver="580.82", torch="2.13.0", date="2026-11-22", fingerprint="these")
HEALTHY = Environment(
    python=PythonFacts(
        version="3.12.4",
        implementation="CPython",
        free_threaded=False,
        libc=("glibc", "2.36"),
        executable="/bin/python",
    ),
    wheel=WheelFacts(
        version="0.1.0+cu130",
        path="/site/mxfp4_moe",
        has_report=True,
        profile="mxfp4_minimal",
        archs=("90a", "120f"),
        tiles=2,
        cuda="13.0.88",
        torch="2.13.0",
        torch_floor="2.10",
        python_floor="3.10",
        libraries=tuple(Library(module=module, fault="", built_sha256="ab", sha256="ab") for module in MODULES),
        cudart="libcudart.so.13",
        glibc_floor="2.34",
    ),
    torch=TorchFacts(
        version="2.13.0+cu130",
        cuda="13.0",
        path="/site/torch",
        cudart="/site/nvidia/libcudart.so.13",
        gpus=(H200.name,),
        loaded=dict.fromkeys(MODULES, ""),
    ),
    cudart=CudartFacts(soname="libcudart.so.13", path="/site/nvidia/libcudart.so.13", version="13.0"),
    driver=DriverFacts(version="580.82.07", cuda="13.0", gpus=(H200,)),
    memories=(Remembered(device=H200.name, path="/cache/h200.json", result=RESULT, same_libraries=True),),
    tuned=(TunedTable(name="h200.json", device=H200.name),),
    verified=True,
    cache_dir="/cache",
)
ALL_SUBJECTS = [subject for subject, _ in checks.CHECKS]


def change(**parts: dict[str, Any] | None) -> Environment:
    """The healthy environment with some fields of its parts changed; None takes the whole part away."""
    changed = {}
    for name, fields in parts.items():
        changed[name] = None if fields is None else dataclasses.replace(getattr(HEALTHY, name), **fields)
    return dataclasses.replace(HEALTHY, **changed)


def bad(findings: list[Finding]) -> list[tuple[Level, str]]:
    return [(finding.level, finding.subject) for finding in findings if finding.level is not OK]


def libraries(**changes: dict[str, str]) -> dict[str, Any]:
    """The wheel's libraries with changed fields, by module."""
    assert HEALTHY.wheel
    return {
        "libraries": tuple(
            dataclasses.replace(library, **changes.get(library.module, {})) for library in HEALTHY.wheel.libraries
        )
    }


NO_CUDART = "libcudart.so.13: cannot open shared object file: No such file or directory"
CPU = {"version": "2.13.0+cpu", "cuda": "", "gpus": (), "loaded": {}, "cudart": ""}
NO_GPU = {"version": "unknown", "cuda": "none", "gpus": ()}
REINSTALL = "reinstall the wheel: pip install --force-reinstall"
CASES: dict[str, tuple[Environment, list[tuple[Level, str, str, str]]]] = {
    "free-threaded Python": (
        change(python={"free_threaded": True}),
        [(ERROR, "Python", "free-threaded, does not load", "an ordinary build of CPython 3.10 or newer")],
    ),
    "PyPy": (change(python={"implementation": "PyPy"}), [(ERROR, "Python", "PyPy", "CPython")]),
    "old Python": (change(python={"version": "3.9.18"}), [(ERROR, "Python", "needs 3.10 or newer", "CPython 3.10")]),
    "old glibc": (
        change(python={"libc": ("glibc", "2.31")}),
        [(ERROR, "glibc", "2.31: the wheel's libraries need 2.34", "newer Linux")],
    ),
    "musl": (change(python={"libc": ("", "")}), [(WARNING, "glibc", "unknown: the wheel needs glibc", "newer Linux")]),
    "no torch": (
        change(
            torch={"error": "ModuleNotFoundError: No module named 'torch'", "version": "", "cuda": "", "loaded": {}}
        ),
        [(ERROR, "torch", "torch is not installed", "pip install 'torch>=2.10', in a build for CUDA 13")],
    ),
    "broken torch": (
        change(torch={"error": "ImportError: libcudnn.so.9: cannot open", "version": "", "cuda": "", "loaded": {}}),
        [(ERROR, "torch", "(ImportError: libcudnn.so.9", "reinstall torch")],
    ),
    "torch that crashes": (
        change(torch={"version": "", "cuda": "", "loaded": {}, "ended": "ended with signal SIGILL"}, cudart=None),
        [
            (ERROR, "torch", "the process that imports it ended with signal SIGILL", "reinstall torch"),
            (WARNING, "CUDA runtime", "was not looked for", "torch"),
        ],
    ),
    "no torch, and a driver with a trouble of its own": (
        change(
            torch={"error": "ModuleNotFoundError: No module named 'torch'", "version": "", "cuda": "", "loaded": {}},
            driver={"gpus": (), "error": "cuInit: unknown error (999)"},
        ),
        [
            (ERROR, "driver", "580.82.07, which serves CUDA 13.0: cuInit: unknown error (999)", "nvidia-smi"),
            (ERROR, "torch", "torch is not installed", "pip install 'torch>=2.10'"),
        ],
    ),
    "old torch": (
        change(torch={"version": "2.9.1+cu130", "loaded": {"moe": "undefined symbol: torch_list_push_back"}}),
        [(ERROR, "torch", "2.9.1+cu130 with CUDA 13.0: older than 2.10", "pip install --upgrade 'torch>=2.10'")],
    ),
    "CPU torch with a GPU": (
        change(torch=CPU),
        [(ERROR, "torch", "sees no GPU, and there is one", "a torch 2.10 or newer that is built for CUDA 13")],
    ),
    "CPU torch, no GPU, no runtime": (
        dataclasses.replace(
            change(torch=CPU, driver=NO_GPU, cudart={"error": NO_CUDART, "version": "", "path": ""}), memories=()
        ),
        [
            (WARNING, "driver", "no NVIDIA driver here", "CPU tensors work, slowly"),
            (WARNING, "torch", "with no CUDA", "CPU tensors work, slowly; for a GPU install a torch"),
        ],
    ),
    "ROCm torch": (change(torch=CPU | {"hip": "6.4"}), [(ERROR, "torch", "with ROCm 6.4", "built for CUDA 13")]),
    "no CUDA runtime": (
        change(
            cudart={"error": NO_CUDART, "version": "", "path": ""}, torch={"loaded": dict.fromkeys(MODULES, NO_CUDART)}
        ),
        [
            (ERROR, "CUDA runtime", "is not found (libcudart.so.13: ", "LD_LIBRARY_PATH"),
            (ERROR, "loading", "(and 2 more for the same reason)", "LD_LIBRARY_PATH"),
        ],
    ),
    "a wheel for another CUDA": (
        change(
            cudart={"error": NO_CUDART, "version": "", "path": ""},
            torch={"cuda": "12.8", "loaded": {"moe": NO_CUDART}},
        ),
        [
            (ERROR, "CUDA runtime", "this torch brings that of CUDA 12", "or the mxfp4-moe wheel for CUDA 12"),
            (ERROR, "loading", "moe: the wheel needs", "install a torch that is built for CUDA 13"),
        ],
    ),
    "two CUDA runtimes": (
        change(torch={"cuda": "12.8", "cudart": "/site/libcudart.so.12"}),
        [(WARNING, "CUDA runtime", "torch brings another, /site/libcudart.so.12", "so that both use one")],
    ),
    "old driver": (
        change(driver={"cuda": "12.4"}, torch={"gpus": (), "gpu_error": "The NVIDIA driver on your system is too old"}),
        [
            (ERROR, "driver", "too old for the wheel, which is for CUDA 13", "one that serves CUDA 13"),
            (ERROR, "GPU", "torch sees 0 of 1: the NVIDIA driver is older", "update the NVIDIA driver"),
        ],
    ),
    "driver in two versions": (
        change(
            driver={
                "gpus": (),
                "error": "cuInit: system has unsupported display driver / cuda driver combination (803)",
            }
        ),
        [(ERROR, "driver", "not of one version", "restart the machine")],
    ),
    "no GPU shown": (
        change(driver={"gpus": ()}, torch={"gpus": ()}),
        [(WARNING, "GPU", "the driver shows this process none", "CUDA_VISIBLE_DEVICES")],
    ),
    "GPU of another arch": (
        change(driver={"gpus": (OLD_GPU,)}),
        [(ERROR, "GPU", "RTX 4090, compute capability 8.9: no cubin", "this wheel runs on sm_90a, sm_120f; CPU")],
    ),
    "GPU of another arch beside a good one": (
        change(driver={"gpus": (SPARK, OLD_GPU)}, torch={"gpus": ("a", "b")}),
        [(WARNING, "GPU", "compute capability 8.9: no cubin", "this wheel runs on sm_90a, sm_120f")],
    ),
    "GPU that torch does not see": (
        change(driver={"gpus": (H200, SPARK)}),
        [(WARNING, "GPU", "torch sees 1 of 2", "CUDA_VISIBLE_DEVICES")],
    ),
    "two owners": (
        change(wheel={"conflict": "a 1 and b 1 are both installed in /site: pip uninstall a b, then install one"}),
        [(ERROR, "wheel", "a 1 and b 1 are both installed in /site", "pip uninstall a b, then install one")],
    ),
    "no report": (change(wheel={"has_report": False}), [(ERROR, "wheel", "a damaged install", REINSTALL)]),
    "a tile is missing": (
        change(wheel=libraries(**{FIRST.module: {"fault": f"{FIRST.module}.abi3.so is missing", "sha256": ""}})),
        [(WARNING, "libraries", "is missing", REINSTALL)],
    ),
    "the layer is missing": (
        change(wheel=libraries(moe={"fault": "moe.abi3.so is missing", "sha256": ""})),
        [(ERROR, "libraries", "moe.abi3.so is missing", REINSTALL)],
    ),
    "all tiles are missing": (
        change(wheel=libraries(**{module: {"fault": f"{module} is missing"} for module in MODULES[1:]})),
        [(ERROR, "libraries", f"{FIRST.module} is missing; {SECOND.module} is missing", REINSTALL)],
    ),
    "an edited tile": (
        change(wheel=libraries(**{FIRST.module: {"sha256": "cd"}})),
        [(ERROR, "hashes", f"1 of 3 libraries are not what was built: {FIRST.module}.abi3.so", REINSTALL)],
    ),
    "no hashes in the report": (
        change(wheel=libraries(moe={"built_sha256": ""})),
        [(WARNING, "hashes", "1 of 3 libraries have no hash", REINSTALL)],
    ),
    "a tile does not load": (
        change(
            torch={"loaded": dict.fromkeys(MODULES, "") | {FIRST.module: f"{FIRST.module}.abi3.so: file too short"}}
        ),
        [(WARNING, "loading", f"{FIRST.module}: a file of the wheel is not what was built", REINSTALL)],
    ),
    "a message that nobody knows": (
        change(torch={"loaded": dict.fromkeys(MODULES, "") | {"moe": "the moon is full"}}),
        [(ERROR, "loading", "moe: the moon is full", REINSTALL)],
    ),
    "a crash while loading": (
        change(torch={"loaded": {"moe": ""}, "ended": f"ended with signal SIGSEGV while {FIRST.module} was loaded"}),
        [(ERROR, "loading", f"SIGSEGV while {FIRST.module} was loaded", "open an issue")],
    ),
    "a self-test that failed": (
        dataclasses.replace(
            HEALTHY,
            memories=(
                Remembered(
                    device=H200.name,
                    path="/cache/h200.json",
                    blocked={FIRST.name: "3 of 9 values differ"},
                    result=dataclasses.replace(RESULT, passed=25),
                    same_libraries=True,
                ),
            ),
        ),
        [
            (WARNING, "self-test", "25 of 26 tiles passed", "calls use the tiles that passed"),
            (WARNING, "blocklist", f"{FIRST.name} failed the self-test on NVIDIA H200: 3 of 9 values", "--selftest"),
        ],
    ),
    "a foreign blocklist": (
        dataclasses.replace(
            HEALTHY, memories=(Remembered(device=H200.name, path="/cache", blocklist_fault="is for another wheel"),)
        ),
        [(WARNING, "blocklist", "is for another wheel", "`mxfp4-moe doctor --selftest` to write a new one")],
    ),
    "no home": (
        dataclasses.replace(HEALTHY, cache_dir=""),
        [(WARNING, "blocklist", "this user has no home", "set MXFP4_MOE_CACHE_DIR to a folder")],
    ),
    "a damaged tuned table": (
        dataclasses.replace(HEALTHY, tuned=(TunedTable(name="x.json", fault="KeyError: 'device'"),)),
        [(WARNING, "tuned tables", "x.json cannot be read (KeyError: 'device')", REINSTALL)],
    ),
}
