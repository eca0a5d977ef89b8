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
    check_kernels,
    check_main_loop,
    check_memory,
    check_paths,
)
from wheelbuild.load import check_load
from wheelbuild.machine_code import Code, Resources
from wheelbuild.plan import gencode
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import package_dirs, resolve_cuda

LOOP = {
    **{"opcode": "HMMA", "mma_per_step": 1, "matrices_per_step": 2},
    **{"words_per_step": 1, "words_per_load": 2, "variants": False, "limit": 2.5},
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


PLAIN = "_ZN9mxfp4_moe12grouped_gemmIN19sm_120f_mxfp4_mxfp84TileEEE"
FP4 = PLAIN.replace("mxfp4_mxfp8", "mxfp4_mxfp4")
OTHER = "_ZN9mxfp4_moe18grouped_gemm_wgmmaIN17sm_90a_mxfp4_bf164TileEEE"
MXFP8, WGMMA = {"mxfp4_mxfp8": "grouped_gemm"}, {"mxfp4_bf16": "grouped_gemm_wgmma"}


def both(plain: tuple[str, ...], other: tuple[str, ...]) -> Code:
    return Code(kernels=code_of(*plain, kernel=PLAIN).kernels | code_of(*other, kernel=OTHER).kernels)


def test_a_tile_has_the_kernel_of_its_arch_and_no_other() -> None:
    check_kernels("x.so", "120f", code_of(*GOOD, kernel=PLAIN), MXFP8)
    check_kernels("x.so", "90a", code_of(*GOOD, kernel=OTHER), WGMMA)
    check_kernels("x.so", "120f", both(GOOD, GOOD), MXFP8 | WGMMA)
    expected = "grouped_gemm of mxfp4_mxfp8 and grouped_gemm_wgmma of mxfp4_bf16"
    with pytest.raises(BuildError, match=f"expected {expected}, once and alone, got {PLAIN}$"):
        check_kernels("x.so", "120f", code_of(*GOOD, kernel=PLAIN), MXFP8 | WGMMA)
    sentence = f"^x.so on sm_90a: expected grouped_gemm_wgmma of mxfp4_bf16, once and alone, got {PLAIN}"
    with pytest.raises(BuildError, match=f"{sentence}$"):
        check_kernels("x.so", "90a", code_of(*GOOD, kernel=PLAIN), WGMMA)
    with pytest.raises(BuildError, match=f"{sentence}, {OTHER}$"):
        check_kernels("x.so", "90a", both(GOOD, GOOD), WGMMA)
    with pytest.raises(BuildError, match="once and alone, got no kernels$"):
        check_kernels("x.so", "90a", Code(), WGMMA)


def test_kernels_of_one_template_are_told_apart_by_their_pair() -> None:
    pairs = MXFP8 | {"mxfp4_mxfp4": "grouped_gemm"}
    two = Code(kernels=code_of(*GOOD, kernel=PLAIN).kernels | code_of(*GOOD, kernel=FP4).kernels)
    check_kernels("x.so", "120f", two, pairs)
    assert list(two.of("grouped_gemm", "mxfp4_mxfp4").kernels) == [FP4]
    with pytest.raises(BuildError, match="expected grouped_gemm of mxfp4_mxfp8 and grouped_gemm of nvfp4_nvfp4, once"):
        check_kernels("x.so", "120f", two, MXFP8 | {"nvfp4_nvfp4": "grouped_gemm"})


OUTER = ("LDG.E.U8 R4, [R2]", "LDS.128 R4, [R2]", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA {0}")
NARROW = ("LDS.128 R4, [R2]", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA {4}")
WIDE = ("LDS.128 R4, [R2]", "HMMA.16816.F32 R4, R8, R12, R4", "HMMA.16816.F32 R4, R8, R12, R4", "NOP", "@P0 BRA {7}")


def test_of_variants_the_loop_for_most_rows_counts() -> None:
    """Not the one that reads global memory, which has most instructions per MMA, nor one for fewer rows."""
    expect = LOOP | {"variants": True, "words_per_step": 2, "words_per_load": 4, "matrices_per_step": 0}
    code = code_of(*OUTER, *NARROW, *WIDE, "EXIT")
    loop = check_main_loop("x.so on sm_90a", code, expect)
    assert (loop.instructions, loop.mma) == (5, 2)
    with pytest.raises(BuildError, match="2.5 instructions per HMMA in the main loop .5 for 2., at most 2.4 allowed"):
        check_main_loop("x.so on sm_90a", code, expect | {"limit": 2.4})
    with pytest.raises(BuildError, match="LDS of 128 bits load 4 words for 2 HMMA in the main loop, which need 8"):
        check_main_loop("x.so on sm_90a", code, expect | {"words_per_step": 4})
    with pytest.raises(BuildError, match="LDSM loads 0 matrices for 2 HMMA in the main loop, which need 4"):
        check_main_loop("x.so on sm_90a", code, expect | {"matrices_per_step": 2})
    with pytest.raises(BuildError, match="^x.so on sm_90a: every loop around HMMA reads global memory, expected one"):
        check_main_loop("x.so on sm_90a", code_of(*OUTER, "EXIT"), expect)
    assert check_main_loop("x.so on sm_90a", code_of(*OUTER, "EXIT"), LOOP | {"limit": 4, **NOTHING}).ldg == 1


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


SERIALIZED = "ptxas info    : (C{}) {}wgmma.mma_async instructions are serialized due to ill formed pipeline stage\n"


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
        *(
            (
                {"output": PTXAS.replace("(C7508)", "") + SERIALIZED.format(number, words)},
                f"ptxas gave .* .C{number}. ",
            )
            for number in (7510, 7511, 7512)
            for words in ("Potential Performance Loss: ", "")
        ),
    ],
)
def test_a_compilation_that_costs_too_much_or_gave_up_is_refused(changes: dict[str, Any], message: str) -> None:
    limits = {"peak_mb": 2000}
    check_compiling("x.so", {"tile_x.120f": record(cpu_seconds=4000.0)}, limits)  # a slow machine is no fault
    with pytest.raises(BuildError, match=f"^x.so: {message}"):
        check_compiling("x.so", {"tile_x.90a": record(), "tile_x.120f": record(**changes)}, limits)


ASYNCHRONOUS = r"""
__global__ void multiply(float* out, unsigned long long a, unsigned long long b) {
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int i = 0; i < 4; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    BETWEEN
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


def test_mmas_that_ptxas_serializes_are_refused(tmp_path: Path) -> None:
    """In ptxas's own words: accumulators that something else writes between two asynchronous MMAs."""
    nvcc = resolve_cuda(os.environ, package_dirs(os.environ), ["90a"]).nvcc

    def compiled(between: str) -> dict[str, Any]:
        source = tmp_path / "multiply.cu"
        source.write_text(ASYNCHRONOUS.replace("BETWEEN", between), encoding="utf-8")
        flags = ["-cubin", "-Xptxas", "-v", *gencode("90a"), "-o", str(tmp_path / "multiply.cubin"), str(source)]
        result = subprocess.run([str(nvcc), *flags], capture_output=True, text=True, check=True)
        return record(output=result.stdout + result.stderr)

    limits = {"peak_mb": 2000}
    check_compiling("x.so", {"tile_x.90a": compiled("")}, limits)
    sentence = r"compiling tile_x\.90a: \(C751\d\) Potential Performance Loss: wgmma\.mma_async instructions are serial"
    with pytest.raises(BuildError, match=sentence):
        check_compiling("x.so", {"tile_x.90a": compiled("d[0] += 1;")}, limits)


def test_a_path_of_the_build_machine_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.write_bytes(b"\0csrc/tile/tile.cu\0")
    check_paths(library, [Path("/home/me")])
    library.write_bytes(b"\0/home/me/src/tile.cu\0more")
    with pytest.raises(BuildError, match=r"x\.so contains a path of the build machine: /home/me/src/tile\.cu$"):
        check_paths(library, [Path("/home/me")])


def facts(**changes: int) -> dict[str, int]:
    """Of a tile, as far as they go."""
    return {"tile_m": 8, "stages": 3} | changes


def of_kernels(sm90: object, sm12x: object, in_bf16: object = None) -> dict[str, object]:
    """Of the kernels of a tile of profile `full`."""
    return {"90a": {"mxfp4_bf16": sm90}, "120f": {"mxfp4_mxfp8": sm12x, "mxfp4_bf16": in_bf16 or facts()}}


EXPECT = {"ops": ["mxfp4_moe::grouped_gemm_x"], "facts": of_kernels(facts(), facts())}
LOADED = {
    "ops": ["mxfp4_moe::grouped_gemm_x"],
    "facts": of_kernels(facts(), facts()),
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
            {"facts": {"90a": {"mxfp4_bf16": facts()}, "120f": {"mxfp4_mxfp8": facts()}}},
            r"on sm_120f: has facts for .*, expected pairs \['mxfp4_bf16', 'mxfp4_mxfp8'\]",
        ),
        (
            {"facts": of_kernels(facts(), facts(), facts(stages=2))},
            r"on sm_120f, mxfp4_bf16: stages is 2 in the compiled tile and 3 in the proof of tiles/bf16\.py; "
            r"csrc/tile/sm12x/bf16_tile_shape\.cuh and tiles/bf16\.py must agree$",
        ),
        (
            {"facts": of_kernels(facts(), facts(tile_m=16))},
            r"on sm_120f, mxfp4_mxfp8: tile_m is 16 in the compiled tile and 8 in the proof of tiles/proof\.py; "
            r"csrc/tile/tile_shape\.cuh and tiles/proof\.py must agree$",
        ),
        (
            {"facts": of_kernels(facts(stages=5), facts())},
            r"on sm_90a, mxfp4_bf16: stages is 5 in the compiled tile and 3 in the proof of tiles/bf16\.py; "
            r"csrc/tile/sm90/tile_shape\.cuh and tiles/bf16\.py must agree$",
        ),
        (
            {"facts": of_kernels({"tile_m": 8}, facts())},
            r"on sm_90a, mxfp4_bf16: has the facts \['tile_m'\], expected \['stages', 'tile_m'\]; "
            r"csrc/tile/tile_op\.cpp and",
        ),
        ({"facts": of_kernels(None, facts())}, r"on sm_90a, mxfp4_bf16: has the facts None, expected"),
    ],
)
def test_a_library_that_is_not_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=rf"^x\.so .*{message}"):
        check_load("x.so", {**LOADED, **change}, EXPECT)


SMALLEST = tiles.Tile(m=8, n=64, swap_ab=True)


KERNELS = [(arch, pair) for arch in MANIFEST.archs for pair in tiles.kernel_pairs(arch, tiles.PAIRS)]


@pytest.mark.parametrize("key", tiles.facts(SMALLEST, "120f"))
@pytest.mark.parametrize(("arch", "pair"), KERNELS)
def test_every_single_fact_is_compared_with_the_proof(arch: str, pair: str, key: str) -> None:
    proved: dict[str, dict[str, dict[str, int]]] = {}
    for each, read in KERNELS:
        proved.setdefault(each, {})[read] = tiles.facts(SMALLEST, each, read)
    expect = {"ops": ["mxfp4_moe::x"], "facts": proved}
    loaded = {"ops": ["mxfp4_moe::x"], "entry": 1, "error": None}
    check_load("x.so", {**loaded, "facts": proved}, expect)
    other = copy.deepcopy(proved)
    other[arch][pair][key] += 1
    value = proved[arch][pair][key]
    sentence = (
        f"x.so on sm_{arch}, {pair}: {key} is {value + 1} in the compiled tile and {value} in the proof of tiles/"
    )
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
