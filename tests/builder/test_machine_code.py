"""Machine code as the build reads it, and the main loop in it."""

from __future__ import annotations

from machine_code_cases import PTXAS, code_of

from wheelbuild.machine_code import Resources, parse_ptxas, parse_sass, performance_losses
from wheelbuild.main_loop import MainLoop, find_main_loop

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


def test_of_variants_the_longest_loop_that_reads_no_global_memory_counts() -> None:
    lines = (
        "LDG.E.U8.STRONG.GPU R4, [R2]",  # 0: seldom, and worst
        "HMMA.16816.F32 R4, R8, R12, R4",
        "NOP",
        "NOP",
        "@P0 BRA {0}",
        "HMMA.16816.F32 R4, R8, R12, R4",  # 5: few rows
        "NOP",
        "@P0 BRA {5}",
        "HMMA.16816.F32 R4, R8, R12, R4",  # 8: all rows
        "HMMA.16816.F32 R4, R8, R12, R4",
        "NOP",
        "@P0 BRA {8}",
        "EXIT",
    )
    (kernel,) = code_of(*lines).kernels.values()
    assert find_main_loop(kernel, "HMMA", variants=True) == (
        MainLoop(instructions=4, nops=1, mma=2, ldsm=0, ldsm_matrices=0, lds=(0, 0, 0)),
        0,
    )
    worst = find_main_loop(kernel, "HMMA")[0]
    assert worst == MainLoop(instructions=5, nops=2, mma=1, ldsm=0, ldsm_matrices=0, lds=(0, 0, 0), ldg=1)
    (kernel,) = code_of(*lines[:5], "EXIT").kernels.values()
    assert find_main_loop(kernel, "HMMA", variants=True) == (None, 0)


def test_of_two_ways_through_a_loop_the_cheaper_counts() -> None:
    mma = "HMMA.16816.F32 R4, R8, R12, R4"
    ways = (
        "LDS R4, [R2]",  # 0
        "@P0 BRA {5}",
        mma,  # 2: the usual way
        mma,
        "BRA {8}",
        "HMUL2.BF16_V2 R4, R4, R5",  # 5: the dearer way, with one instruction more
        mma,
        mma,
        "NOP",  # 8: both
        "@P1 BRA {0}",
        "EXIT",
    )

    def counts(lines: tuple[str, ...], variants: bool = True) -> tuple[int, int]:
        (kernel,) = code_of(*lines).kernels.values()
        loop, outside = find_main_loop(kernel, "HMMA", variants=variants)
        assert loop is not None
        assert outside == 0
        return loop.instructions, loop.mma

    assert counts(ways, variants=False) == (10, 4)
    assert counts(ways) == (7, 2)
    no_product = tuple("NOP" if place in (5, 6, 7) else line for place, line in enumerate(ways))
    assert counts(no_product) == (10, 2), "a way that multiplies nothing is no alternative"
    scales = ("HMUL2.BF16_V2 R4, R4, R5",)
    operands = (*ways[:2], *scales * 2, ways[4], *scales * 3, *ways[8:9], mma, *ways[9:])
    assert counts(operands) == (8, 1), "but one that multiplies operands"
    again = (*ways[:5], *scales, mma, "@P2 BRA {5}", *ways[8:])
    assert counts(again) == (7, 2), "a loop of fewer instructions with more for each MMA"
    joined = tuple("BRA {5}" if place == 4 else line for place, line in enumerate(ways))
    assert counts(joined) == (10, 4), "what both sides lead to is neither's"


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
