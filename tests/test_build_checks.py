"""What the build reads in machine code and what it refuses, from listings and figures: no compiler, no library.

tests/test_wheel.py runs the same checks on the libraries of the wheel.
"""

from __future__ import annotations

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

from wheelbuild import ROOT, BuildError, build
from wheelbuild.check import (
    check_archs,
    check_compiling,
    check_kernel_names,
    check_main_loop,
    check_memory,
    check_paths,
)
from wheelbuild.load import check_load
from wheelbuild.machine_code import Code, Resources, parse_ptxas, parse_sass, performance_losses
from wheelbuild.main_loop import MainLoop, find_main_loop
from wheelbuild.thresholds import check_wheel, load_thresholds, parse_thresholds, updated
from wheelbuild.tile_model import archs, tiles

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")

# ---- reading machine code --------------------------------------------------------------------------------------------

PTXAS = """ptxas info    : 9 bytes gmem
ptxas info    : Compiling entry function '_Z3oneILi1EEvv' for 'sm_90a'
ptxas info    : Function properties for _Z3oneILi1EEvv
    72 bytes stack frame, 80 bytes spill stores, 76 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 72 bytes cumulative stack size
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : Compiling entry function '_Z3two' for 'sm_120f'
ptxas info    : Function properties for _Z3two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 60 registers, used 1 barriers, 128 bytes smem
"""

SASS = """
Fatbin elf code:
================
arch = sm_120f
code version = [1,8]

	code for sm_120
		Function : _Z3onev
	.headerflags	@"EF_CUDA_SM120"
        /*0000*/                   LDC R1, c[0x0][0x37c] ;          /* 0x0000df00ff017b82 */
                                                                    /* 0x000fe20000000800 */
        /*0010*/                   R2UR UR4, R9 ;
        /*0020*/                   QMMA.SF.16832.F32.E4M3.E2M1.E8 R4, R8, R12, R4, R20, R21, UR4 ;
        /*0030*/              @!UP1 PLOP3.LUT P0, PT, P1, PT, PT, 0x8, 0x0 ;
        /*0040*/               @P0 BRA.U.ANY 0x10 ;
        /*0050*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0060*/                   QMMA.SF.16832.F32.E4M3.E2M1.E8 R4, R8, R12, R4, R20, R21, URZ ;
        /*0070*/               @P1 BRA 0x50 ;
        /*0080*/                   UTMALDG.2D [UR8], [UR6] ;
        /*0090*/               @P0 BRA.U.ANY 0x80 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   NOP;

Fatbin elf code:
================
arch = sm_90a
		Function : _Z3twov
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0010*/                   EXIT ;
"""


def test_ptxas_is_read_per_kernel_and_arch() -> None:
    one, two = parse_ptxas(PTXAS)
    assert one == Resources(
        kernel="_Z3oneILi1EEvv", arch="90a", registers=168, stack_bytes=72, spill_store_bytes=80, spill_load_bytes=76
    )
    assert (two.kernel, two.arch, two.registers, two.spill_store_bytes) == ("_Z3two", "120f", 60, 0)
    (loss,) = performance_losses(PTXAS)
    assert loss.startswith("(C7508) Potential Performance Loss: 'setmaxnreg' ignored;")


def test_instructions_are_counted_per_arch() -> None:
    code = parse_sass(SASS)
    assert sorted(code) == ["120f", "90a"]
    counts = code["120f"].counts()
    assert counts["total"] == 11
    assert (counts["QMMA"], counts["QMMA.SF"], counts["HMMA"], counts["LDSM"]) == (2, 2, 0, 1)
    assert (counts["R2UR"], counts["BRA.U.ANY"], counts["UTMALDG"]) == (1, 2, 1)
    assert code["90a"].counts()["HMMA"] == 1
    assert list(code["90a"].kernels) == ["_Z3twov"]


def test_a_waterfall_is_a_lane_loop_around_the_instruction() -> None:
    code = parse_sass(SASS)["120f"]
    assert code.waterfalls("QMMA.SF") == 1
    assert code.waterfalls("UTMALDG") == 1
    assert code.waterfalls("LDSM") == 0


# ---- the main loop ---------------------------------------------------------------------------------------------------


def code_of(*lines: str, kernel: str = "k") -> Code:
    """A kernel of these lines, 16 bytes apart as on the GPU; `{3}` in a line is the address of line 3."""
    addresses = [f"0x{16 * place:x}" for place in range(len(lines))]
    listing = "\n".join(f"  /*{16 * place:04x}*/  {line.format(*addresses)} ;" for place, line in enumerate(lines))
    return parse_sass(f"arch = sm_90a\n\t\tFunction : {kernel}\n{listing}\n")["90a"]


def main_loop_of(*lines: str) -> tuple[MainLoop | None, int]:
    (kernel,) = code_of(*lines).kernels.values()
    return find_main_loop(kernel, "HMMA")


def test_the_main_loop_is_the_innermost_one_around_the_mmas() -> None:
    loop, outside = main_loop_of(
        "MOV R1, R2",  # 0
        "S2R R3, SR_TID",  # 1: over output tiles
        "LDSM.16.M88.4 R4, [R2]",  # 2: over K tiles
        "LDSM.16.M88.2 R8, [R2]",
        "LDSM.16.M88 R8, [R2]",
        "LDS.128 R16, [R2]",
        "LDS.64 R16, [R2]",
        "LDS R16, [R2]",
        "LDS.U8 R16, [R2]",  # less than a word
        "HMMA.16816.F32 R4, R8, R12, R4",
        "NOP",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "@P0 BRA {2}",  # 12
        "STG.E [R2], R4",
        "BRA.U UP0, {1}",
        "EXIT",
        "BRA {16}",
    )
    assert loop == MainLoop(instructions=11, nops=1, mma=2, ldsm=3, ldsm_matrices=7, lds=(1, 1, 1))
    assert loop.instructions_per_mma == 5.5
    assert loop.report() == {"instructions": 11, "nops": 1, "mma": 2, "ldsm": 3, "instructions_per_mma": 5.5}
    assert outside == 0


def test_a_slow_path_behind_the_end_belongs_to_its_loop_and_is_none_itself() -> None:
    loop, outside = main_loop_of(
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3",  # 0
        "@!P0 BRA {6}",  # 1: not there yet
        "LDSM.16.M88.4 R4, [R2]",  # 2
        "HMMA.16816.F32 R4, R8, R12, R4",
        "@P1 BRA {0}",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3",  # 6
        "@!P0 BRA {6}",
        "BRA {2}",  # back into the middle: {2} to here is no loop
    )
    assert loop == MainLoop(instructions=8, nops=0, mma=1, ldsm=1, ldsm_matrices=4, lds=(0, 0, 0))
    assert outside == 0


def test_of_several_loops_the_worst_counts_and_lone_mmas_are_told() -> None:
    loop, outside = main_loop_of(
        "HMMA.16816.F32 R4, R8, R12, R4",
        "HMMA.16816.F32 R4, R8, R12, R4",  # 1
        "@P0 BRA {1}",
        "HMMA.16816.F32 R4, R8, R12, R4",  # 3
        "NOP",
        "@P0 BRA {3}",
        "EXIT",
    )
    assert loop == MainLoop(instructions=3, nops=1, mma=1, ldsm=0, ldsm_matrices=0, lds=(0, 0, 0))
    assert outside == 1
    assert main_loop_of("HMMA.16816.F32 R4, R8, R12, R4", "EXIT") == (None, 1)
    assert main_loop_of("NOP", "BRA {0}") == (None, 0)


def test_an_indirect_branch_may_go_wherever_nothing_else_leads() -> None:
    loop, outside = main_loop_of(
        "LDS R4, [R2]",  # 0
        "HMMA.16816.F32 R4, R8, R12, R4",
        "BRXU UR4 -0x30",
        "STG.E [R2], R4",  # 3: one case of a switch, which only the table knows
        "@P0 BRA {0}",
        "EXIT",
    )
    assert loop == MainLoop(instructions=5, nops=0, mma=1, ldsm=0, ldsm_matrices=0, lds=(1, 0, 0))
    assert outside == 0


# ---- what a library's code must show ---------------------------------------------------------------------------------

GOOD = (
    "LDSM.16.M88.4 R4, [R2]",
    "LDS.64 R4, [R2]",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "@P0 BRA {0}",
    "EXIT",
)
LOOP = {
    **{"opcode": "HMMA", "mma_per_step": 1, "matrices_per_step": 2},
    **{"words_per_step": 1, "words_per_load": 2, "limit": 2.5},
}
RESOURCES = [
    Resources(kernel=name, arch=arch, registers=168, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0)
    for name, arch in (("a", "90a"), ("b", "120f"))
]


def test_a_good_loop_passes_and_is_reported() -> None:
    assert check_main_loop("x.so", "90a", code_of(*GOOD), LOOP).report()["instructions_per_mma"] == 2.5
    check_main_loop("x.so", "90a", code_of(*GOOD, "NOP"), LOOP | {"limit": None})


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
        check_main_loop("x.so", "90a", code_of(*lines), LOOP | expect)


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


def test_a_second_kernel_is_checked_too() -> None:
    """A tile may have two: neither may spill or have MMAs outside of loops, and the worse loop is what counts."""
    first, second = code_of(*GOOD, kernel="a"), code_of(*GOOD[:4], "NOP", *GOOD[4:], kernel="b")
    for one, other in ((first, second), (second, first)):
        code = Code(kernels=one.kernels | other.kernels)
        assert check_main_loop("x.so", "90a", code, LOOP | {"limit": 3.0}).instructions_per_mma == 3.0
        with pytest.raises(BuildError, match="3.0 instructions per HMMA in the main loop"):
            check_main_loop("x.so", "90a", code, LOOP)
        beside = Code(kernels=one.kernels | {"_ZN9mxfp4_moe12grouped_gemmI4TileEE": next(iter(other.kernels.values()))})
        of_shared = check_main_loop("x.so", "90a", beside, LOOP | {"limit": 3.0}).instructions_per_mma
        assert of_shared == check_main_loop("x.so", "90a", other, LOOP | {"limit": 3.0}).instructions_per_mma
    bare = Code(kernels=first.kernels | code_of("HMMA.16816.F32 R4, R8, R12, R4", "EXIT", kernel="b").kernels)
    with pytest.raises(BuildError, match="1 of 3 HMMA are in no loop"):
        check_main_loop("x.so", "90a", bare, LOOP)
    used = [dataclasses.replace(RESOURCES[0], kernel=kernel) for kernel in "ab"]
    check_memory("x.so", {"90a": bare}, used)
    with pytest.raises(BuildError, match="8 bytes of spill stores"):
        check_memory("x.so", {"90a": bare}, [used[0], dataclasses.replace(used[1], spill_store_bytes=8)])


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


# ---- what a library must bring ---------------------------------------------------------------------------------------

EXPECT = {"ops": ["mxfp4_moe::grouped_gemm_x"], "facts": {"90a": {"stages": 3}, "120f": {"stages": 3}}}
LOADED = {
    "ops": ["mxfp4_moe::grouped_gemm_x"],
    "facts": {"90a": {"stages": 3}, "120f": {"stages": 3}},
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
        ({"facts": {"90a": {"stages": 3}}}, r"has facts for archs \['90a'\], expected \['120f', '90a'\]"),
        (
            {"facts": {"90a": {"stages": 3}, "120f": {"stages": 2}}},
            r"on sm_120f: stages is 2 in the compiled tile and 3 in the proof of tiles\.py",
        ),
        ({"facts": {"90a": {}, "120f": {}}}, "on sm_90a: stages is None in the compiled tile and 3"),
    ],
)
def test_a_library_that_is_not_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=rf"^x\.so .*{message}"):
        check_load("x.so", {**LOADED, **change}, EXPECT)


@pytest.mark.parametrize("key", tiles.prove(MANIFEST.tiles[0], "120f").facts())
@pytest.mark.parametrize("arch", MANIFEST.archs)
def test_every_single_fact_is_compared_with_the_proof(arch: str, key: str) -> None:
    tile = MANIFEST.tiles[0]
    facts = {each: tiles.prove(tile, each).facts() for each in MANIFEST.archs}
    expect = {"ops": ["mxfp4_moe::x"], "facts": facts}
    loaded = {"ops": ["mxfp4_moe::x"], "entry": 1, "error": None}
    check_load("x.so", {**loaded, "facts": facts}, expect)
    other = {**facts, arch: facts[arch] | {key: facts[arch][key] + 1}}
    sentence = f"x.so on sm_{arch}: {key} is {facts[arch][key] + 1} in the compiled tile and {facts[arch][key]} in the"
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
        env=os.environ | {"PYTHONPATH": str(ROOT / "ci")},
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


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_an_impossible_row_stops_the_build_before_it_looks_for_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "tile_manifest.toml").read_text(encoding="utf-8")
    row = "{ m = 256, n = 256, swap_ab = false }"
    changed = re.sub(r"\{ m = \d+, n = \d+, swap_ab = false \}", row, text, count=1)
    assert row in changed
    (tmp_path / "tile_manifest.toml").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(BuildError) as error:
        build.resolve_build({"PATH": ""})
    assert re.fullmatch(
        r"tile_manifest\.toml: tile 1 \(m256n256\): impossible on sm_90a: registers: 256 accumulators per thread .*, "
        r"at most 128 leave room for the rest",
        str(error.value),
    )


# ---- thresholds ------------------------------------------------------------------------------------------------------


def test_every_tile_of_the_manifest_has_a_limit_and_nothing_else_does() -> None:
    limits = load_thresholds().instructions_per_mma
    assert set(limits) == {arch for arch in MANIFEST.archs if archs.mma_opcode(arch) == "QMMA.SF"}
    for arch, by_tile in limits.items():
        legal = {tile.name for tile in tiles.CANDIDATES if tiles.prove(tile, arch).legal}
        assert {tile.name for tile in MANIFEST.tiles} <= set(by_tile) <= legal
        assert all(1 < limit < 40 for limit in by_tile.values())


def test_the_promised_limits() -> None:
    thresholds = load_thresholds()
    limits = thresholds.instructions_per_mma["120f"]
    assert limits["m128n128"] <= 3.5
    assert limits["m256n64"] <= 3.55
    assert (thresholds.peak_mb, thresholds.wheel_bytes) == (2000, 12_000_000)


LIMITS = """# By hand
[compile]
peak_mb = 2000
[wheel]
bytes = 10
[instructions_per_mma.set."120f"]
m128n128 = 3.5 # promised

# Written
[instructions_per_mma.measured]
[instructions_per_mma.measured."120f"]
m128n128 = 9.0
m64n64 = 8.0
"""


def test_an_update_measures_anew_and_keeps_what_was_set_by_hand() -> None:
    assert parse_thresholds(LIMITS).instructions_per_mma == {"120f": {"m128n128": 3.5, "m64n64": 8.0}}
    figures = {"m128n128": 5.0, "m64n64": 6.0, "m64n32": 7.03}
    report = {
        "tiles": {
            name: {"archs": {"120f": {"main_loop": {"instructions_per_mma": figure}}}}
            for name, figure in figures.items()
        }
    }
    text = updated(LIMITS, report)
    assert text.startswith(LIMITS.split('[instructions_per_mma.measured."120f"]')[0])
    assert parse_thresholds(text).instructions_per_mma == {"120f": {"m128n128": 3.5, "m64n64": 6.3, "m64n32": 7.4}}
    assert updated(text, report) == text


@pytest.mark.parametrize("text", ["[compile", "[compile]\n", LIMITS.replace("peak_mb", "peak"), "compile = 1\n"])
def test_a_threshold_file_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(BuildError, match=r"^ci/thresholds\.toml: not what wheelbuild\.thresholds reads: "):
        parse_thresholds(text)


def test_a_wheel_that_is_too_large_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"0" * 10)
    check_wheel(wheel, parse_thresholds(LIMITS))
    wheel.write_bytes(b"0" * 11)
    with pytest.raises(BuildError, match=r"^x\.whl has 11 bytes, at most 10 allowed \(ci/thresholds\.toml\)$"):
        check_wheel(wheel, parse_thresholds(LIMITS))


def test_a_report_is_json_that_thresholds_read(tmp_path: Path) -> None:
    loop = find_main_loop(next(iter(code_of(*GOOD).kernels.values())), "HMMA")[0]
    assert loop is not None
    report = {"tiles": {"m64n64": {"archs": {"120f": {"main_loop": json.loads(json.dumps(loop.report()))}}}}}
    assert parse_thresholds(updated(LIMITS, report)).instructions_per_mma["120f"]["m64n64"] == 2.7
