"""What the build reads in machine code and what it refuses, from listings and figures: no compiler, no library.

tests/release/test_wheel.py runs the same checks on the libraries of the wheel."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machine_code_cases import GOOD, MANIFEST, PTXAS, code_of

from wheelbuild import ROOT, BuildError
from wheelbuild.check import (
    check_archs,
    check_compiling,
    check_kernel_names,
    check_main_loop,
    check_main_loops,
    check_memory,
    check_paths,
)
from wheelbuild.load import check_load
from wheelbuild.machine_code import Code, Resources
from wheelbuild.tile_model import tiles

LOOP = {
    **{"opcode": "HMMA", "mma_per_step": 1, "matrices_per_step": 2},
    **{"words_per_step": 1, "words_per_load": 2, "by_width": False, "limit": 2.5},
}
RESOURCES = [
    Resources(kernel=name, arch=arch, registers=168, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0)
    for name, arch in (("a", "90a"), ("b", "120f"))
]


def test_a_good_loop_passes_and_is_reported() -> None:
    assert check_main_loop("x.so on sm_90a", code_of(*GOOD), LOOP).report()["instructions_per_mma"] == 2.5
    check_main_loop("x.so on sm_90a", code_of(*GOOD, "NOP"), LOOP | {"limit": None})


@pytest.mark.parametrize(
    ("lines", "expect", "message"),
    [
        (GOOD, {"opcode": "QMMA.SF"}, r"no QMMA\.SF among 6 instructions$"),
        (
            ("R2UR UR4, R5", *GOOD[:3], "@P0 BRA.U.ANY {0}", *GOOD[3:]),
            {},
            r"1 loops over the lanes of a warp around HMMA; an operand .* \(the scale selector\) is not a constant$",
        ),
        ((*GOOD[:-1], GOOD[2], "EXIT"), {}, r"1 of 3 HMMA are in no loop, expected one around all$"),
        (
            ("LDSM.16.M88.2 R4, [R2]", *GOOD[1:]),
            {},
            r"LDSM loads 2 matrices for 2 HMMA in the main loop, which need 4 of activations; another instruction",
        ),
        (
            (GOOD[0], "LDS R4, [R2]", *GOOD[2:]),
            {},
            r"LDS of 64 bits load 0 words for 2 HMMA in the main loop, which need 2 of weights; narrower loads bring",
        ),
        (
            GOOD,
            {"words_per_step": 2},
            r"LDS of 64 bits load 2 words for 2 HMMA in the main loop, which need 4 of weights; narrower loads bring",
        ),
        (
            ("NOP", *GOOD),
            {},
            r"3\.0 instructions per HMMA in the main loop \(6 for 2\), at most 2\.5 allowed \(ci/thresholds\.toml\)$",
        ),
    ],
)
def test_a_bad_loop_is_refused(lines: tuple[str, ...], expect: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=f"^x.so on sm_90a: {message}"):
        check_main_loop("x.so on sm_90a", code_of(*lines), LOOP | expect)


def test_machine_code_is_for_the_archs_that_were_asked_for() -> None:
    check_archs("x.so", {"90a": Code(), "120f": Code()}, ["120f", "90a"])
    with pytest.raises(BuildError, match="x.so has machine code for sm_90a, expected sm_120f, sm_90a"):
        check_archs("x.so", {"90a": Code()}, ["90a", "120f"])
    with pytest.raises(BuildError, match="x.so has machine code for no arch, expected"):
        check_archs("x.so", {}, ["90a", "120f"])


def test_a_kernel_name_that_two_archs_share_is_refused() -> None:
    check_kernel_names("x.so", {"90a": code_of(*GOOD, kernel="a"), "120f": code_of(*GOOD, kernel="b")})
    with pytest.raises(BuildError, match="x.so: sm_90a and sm_120f share the kernel name a; the linker would keep one"):
        check_kernel_names("x.so", {"90a": code_of(*GOOD, kernel="a"), "120f": code_of(*GOOD, kernel="a")})


@pytest.mark.parametrize("arch", MANIFEST.archs)
def test_no_arch_may_spill(arch: str) -> None:
    code = {"90a": code_of(*GOOD), "120f": code_of(*GOOD)}
    check_memory("x.so", code, RESOURCES)
    for store, load in ((8, 4), (0, 4), (4, 0)):
        spilling = [
            dataclasses.replace(used, spill_store_bytes=store, spill_load_bytes=load) if used.arch == arch else used
            for used in RESOURCES
        ]
        sentence = f"x.so on sm_{arch}: 168 registers are not enough, {store} bytes of spill stores and {load} of loads"
        with pytest.raises(BuildError, match=sentence):
            check_memory("x.so", code, spilling)
    with pytest.raises(BuildError, match=f"x.so on sm_{arch}: ptxas gave no account of registers and spills"):
        check_memory("x.so", code, [used for used in RESOURCES if used.arch != arch])


PLAIN, OTHER = "_ZN9mxfp4_moe12grouped_gemmI4TileEE", "_ZN9mxfp4_moe18grouped_gemm_wgmmaI5ShapeEE"
KERNELS = {
    "plain": LOOP | {"function": "grouped_gemm"},
    "folded": LOOP | {"function": "grouped_gemm_wgmma", "limit": 3.0},
}


def both(plain: tuple[str, ...], other: tuple[str, ...]) -> Code:
    return Code(kernels=code_of(*plain, kernel=PLAIN).kernels | code_of(*other, kernel=OTHER).kernels)


def test_every_kernel_of_a_tile_is_checked_by_its_own_expectation() -> None:
    worse = (*GOOD[:4], "NOP", *GOOD[4:])
    loops = check_main_loops("x.so", "90a", both(GOOD, worse), KERNELS)
    assert {label: loop.instructions_per_mma for label, loop in loops.items()} == {"plain": 2.5, "folded": 3.0}
    with pytest.raises(BuildError, match="^x.so on sm_90a, plain kernel: 3.0 instructions per HMMA .* at most 2.5"):
        check_main_loops("x.so", "90a", both(worse, GOOD), KERNELS)
    with pytest.raises(BuildError, match="^x.so on sm_90a, folded kernel: 3.5 instructions per HMMA .* at most 3.0"):
        check_main_loops("x.so", "90a", both(GOOD, ("NOP", *worse)), KERNELS)
    bare = ("HMMA.16816.F32 R4, R8, R12, R4", "EXIT")
    with pytest.raises(BuildError, match="^x.so on sm_90a, folded kernel: 1 of 1 HMMA are in no loop"):
        check_main_loops("x.so", "90a", both(GOOD, bare), KERNELS)


def test_kernels_are_those_that_the_tile_has() -> None:
    alone = code_of(*GOOD, kernel=PLAIN)
    sentence = "^x.so on sm_90a: expected grouped_gemm_wgmma, its folded kernel, once, got it 0 times among _ZN9mxfp4"
    with pytest.raises(BuildError, match=sentence):
        check_main_loops("x.so", "90a", alone, KERNELS)
    twice = Code(kernels=both(GOOD, GOOD).kernels | code_of(*GOOD, kernel=OTHER + "v").kernels)
    with pytest.raises(BuildError, match="once, got it 2 times"):
        check_main_loops("x.so", "90a", twice, KERNELS)
    with pytest.raises(BuildError, match=f"^x.so on sm_90a: {OTHER} is none of its kernels: plain$"):
        check_main_loops("x.so", "90a", both(GOOD, GOOD), {"plain": KERNELS["plain"]})
    with pytest.raises(BuildError, match="got it 0 times among no kernels"):
        check_main_loops("x.so", "90a", Code(), KERNELS)


FAR = ("LDG.E.U8 R4, [R2]", "LDS.128 R4, [R2]", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA {0}")
NARROW = ("LDS.128 R4, [R2]", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA {4}")
WIDE = ("LDS.128 R4, [R2]", "HMMA.16816.F32 R4, R8, R12, R4", "HMMA.16816.F32 R4, R8, R12, R4", "NOP", "@P0 BRA {7}")


def test_of_loops_by_width_the_widest_counts() -> None:
    """Not the one that reads global memory, which has most instructions per MMA, nor one for fewer rows."""
    expect = LOOP | {"by_width": True, "steps": 1, "words_per_step": 4, "words_per_load": 4, "matrices_per_step": 0}
    code = code_of(*FAR, *NARROW, *WIDE, "EXIT")
    loop = check_main_loop("x.so on sm_90a", code, expect)
    assert (loop.instructions, loop.mma) == (5, 2)
    with pytest.raises(BuildError, match="2.5 instructions per HMMA in the main loop .5 for 2., at most 2.4 allowed"):
        check_main_loop("x.so on sm_90a", code, expect | {"limit": 2.4})
    with pytest.raises(BuildError, match="LDS of 128 bits load 4 words for 2 HMMA in the main loop, which need 8"):
        check_main_loop("x.so on sm_90a", code, expect | {"steps": 2})
    with pytest.raises(BuildError, match="LDSM loads 0 matrices for 2 HMMA in the main loop, which need 4"):
        check_main_loop("x.so on sm_90a", code, expect | {"matrices_per_step": 4})
    with pytest.raises(BuildError, match="^x.so on sm_90a: every loop around HMMA reads global memory, expected one"):
        check_main_loop("x.so on sm_90a", code_of(*FAR, "EXIT"), expect)
    assert check_main_loop("x.so on sm_90a", code_of(*FAR, "EXIT"), LOOP | {"limit": 4, **NOTHING}).ldg == 1


NOTHING = {"words_per_step": 0, "matrices_per_step": 0}  # for one that names no operands


def test_every_kernels_memory_is_checked() -> None:
    used = [dataclasses.replace(RESOURCES[0], kernel=kernel) for kernel in "ab"]
    code = {"90a": both(GOOD, GOOD)}
    check_memory("x.so", code, used)
    with pytest.raises(BuildError, match="8 bytes of spill stores"):
        check_memory("x.so", code, [used[0], dataclasses.replace(used[1], spill_store_bytes=8)])


@pytest.mark.parametrize("opcode", ["LDL", "STL.64"])
def test_local_memory_is_refused_even_where_ptxas_speaks_of_no_spill(opcode: str) -> None:
    code = {"90a": code_of(*GOOD, f"{opcode} [R1], R2"), "120f": code_of(*GOOD)}
    with pytest.raises(BuildError, match=rf"x.so on sm_90a: 1 {opcode[:3]}, which is local memory, none allowed;"):
        check_memory("x.so", code, RESOURCES)


def record(**changes: object) -> dict[str, Any]:
    return {"cpu_seconds": 4.0, "wall_seconds": 4.0, "peak_mb": 400, "output": PTXAS.replace("(C7508)", "")} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_mb": 2001}, r"compiling tile_x\.120f took 2001 MB, at most 2000 allowed \(ci/thresholds\.toml"),
        ({"output": PTXAS}, r"ptxas gave something up when compiling tile_x\.120f: \(C7508\) .* 'setmaxnreg' ignored"),
        (
            {"output": PTXAS.replace("C7508", "C7506")},
            r"ptxas gave something up when compiling tile_x\.120f: \(C7506\) Potential Performance Loss",
        ),
    ],
)
def test_a_compilation_that_costs_too_much_or_gave_up_is_refused(changes: dict[str, Any], message: str) -> None:
    limits = {"peak_mb": 2000}
    check_compiling("x.so", {"tile_x.120f": record(cpu_seconds=4000.0)}, limits)  # a slow machine is no fault
    with pytest.raises(BuildError, match=f"^x.so: {message}"):
        check_compiling("x.so", {"tile_x.90a": record(), "tile_x.120f": record(**changes)}, limits)


def test_a_path_of_the_build_machine_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.write_bytes(b"\0csrc/tile/tile.cu\0")
    check_paths(library, [Path("/home/me")])
    library.write_bytes(b"\0/home/me/src/tile.cu\0more")
    with pytest.raises(BuildError, match=r"x\.so contains a path of the build machine: /home/me/src/tile\.cu$"):
        check_paths(library, [Path("/home/me")])


def facts(**changes: int) -> dict[str, Any]:
    """Of a tile with two kernels; `changes` are the second's."""
    return {"tile_m": 8, "kernels": {"plain": {"stages": 3}, "folded": {"stages": 4} | changes}}


EXPECT = {"ops": ["mxfp4_moe::grouped_gemm_x"], "facts": {"90a": facts(), "120f": facts()}}
LOADED = {
    "ops": ["mxfp4_moe::grouped_gemm_x"],
    "facts": {"90a": facts(), "120f": facts()},
    "entry": 1,
    "error": None,
}


def test_a_library_that_is_as_expected_passes() -> None:
    check_load("x.so", LOADED, EXPECT)
    check_load("moe.so", {**LOADED, "facts": None, "entry": None}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": ["mxfp4_moe::other"]}, "registers mxfp4_moe::other, expected exactly mxfp4_moe::grouped_gemm_x"),
        ({"ops": ["mxfp4_moe::grouped_gemm_x", "mxfp4_moe::other"]}, "registers .*other, expected exactly"),
        ({"ops": []}, "registers no operator of mxfp4_moe"),
        ({"error": "file too short"}, "cannot be loaded: file too short"),
        ({"entry": 0}, "has no address in its attribute 'entry'"),
        ({"facts": None}, r"has facts for archs None, expected \['120f', '90a'\]"),
        ({"facts": {"90a": facts()}}, r"has facts for archs \['90a'\], expected \['120f', '90a'\]"),
        (
            {"facts": {"90a": facts(), "120f": facts() | {"tile_m": 16}}},
            r"on sm_120f: tile_m is 16 in the compiled tile and 8 in the proof of tiles/proof\.py; csrc/",
        ),
        (
            {"facts": {"90a": facts(), "120f": {**facts(), "kernels": facts()["kernels"] | {"plain": {}}}}},
            r"on sm_120f, plain kernel: stages is None in the compiled tile and 3 in the proof of tiles/proof\.py",
        ),
        (
            {"facts": {"90a": facts(stages=5), "120f": facts()}},
            r"on sm_90a, folded kernel: stages is 5 in the compiled tile and 4 in the proof of tiles/sm90\.py; csrc"
            r"/tile/sm90 and tiles/sm90\.py must agree$",
        ),
        (
            {"facts": {"90a": {"tile_m": 8, "kernels": {"plain": {"stages": 3}}}, "120f": facts()}},
            r"on sm_90a: has facts of the kernels \['plain'\], expected \['folded', 'plain'\]; csrc/tile/shapes",
        ),
        ({"facts": {"90a": {"tile_m": 8}, "120f": facts()}}, r"on sm_90a: has facts of the kernels None, expected"),
    ],
)
def test_a_library_that_is_not_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=rf"^x\.so .*{message}"):
        check_load("x.so", {**LOADED, **change}, EXPECT)


SMALLEST = tiles.Tile(m=8, n=64, swap_ab=True)
EVERY = [(arch, kernel) for arch in MANIFEST.archs for kernel in tiles.kernels_of(SMALLEST, arch)]


@pytest.mark.parametrize("key", tiles.prove(SMALLEST, "120f").facts())
@pytest.mark.parametrize(("arch", "kernel"), EVERY)
def test_every_single_fact_is_compared_with_the_proof(arch: str, kernel: tiles.Kernel, key: str) -> None:
    proved = {each: tiles.facts(SMALLEST, each) for each in MANIFEST.archs}
    expect = {"ops": ["mxfp4_moe::x"], "facts": proved}
    loaded = {"ops": ["mxfp4_moe::x"], "entry": 1, "error": None}
    check_load("x.so", {**loaded, "facts": proved}, expect)
    other = copy.deepcopy(proved)
    other[arch]["kernels"][kernel.label][key] += 1
    value = tiles.prove(SMALLEST, arch, kernel).facts()[key]
    sentence = f"x.so on sm_{arch}, {kernel.label} kernel: {key} is {value + 1} in the compiled tile and {value} in the"
    with pytest.raises(BuildError, match=sentence):
        check_load("x.so", {**loaded, "facts": other}, expect)


def run_load(library: Path, module: str, expect: dict[str, Any], output: Path) -> subprocess.CompletedProcess[str]:
    named = library.with_name(f"{module}.abi3.so")
    shutil.copy(library, named)
    words = ["--expect", json.dumps({module: expect}), "--cudart", "libm.so.6", "--output", str(output), str(named)]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "wheelbuild.load", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_library_that_takes_its_process_with_it_is_one_sentence(tmp_path: Path) -> None:
    source = tmp_path / "x.c"
    source.write_text("__attribute__((constructor)) void f(void) { __builtin_trap(); }\n", encoding="utf-8")
    library = tmp_path / "x.so"
    subprocess.run(["g++", "-xc", "-shared", "-fPIC", source, "-o", library], check=True)
    result = run_load(library, "tile_x", EXPECT, tmp_path / "load.json")
    assert result.returncode == 1
    sentence = r"refused: tile_x\.abi3\.so cannot be loaded: loading it ended the process with SIG(ILL|TRAP|ABRT)\n"
    assert re.fullmatch(sentence, result.stdout), result
    assert not (tmp_path / "load.json").exists()
