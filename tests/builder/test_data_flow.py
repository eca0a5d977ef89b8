"""Where a register's value comes from, in kernels of a few lines."""

from __future__ import annotations

import pytest

from wheelbuild.data_flow import DataFlow, Register, parse_register, written
from wheelbuild.machine_code import Instruction, parse_sass


def kernel(*lines: str) -> list[Instruction]:
    listing = "\n".join(f"  /*{16 * place:04x}*/  {line} ;" for place, line in enumerate(lines))
    return parse_sass(f"arch = sm_120f\n\t\tFunction : k\n{listing}\n")["120f"].kernels["k"]


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("LDS.128 R16, [R2]", "R16 R17 R18 R19"),
        ("LDSM.16.M88.2 R16, [R2]", "R16 R17"),
        ("IMAD.WIDE.U32 R4, R5, R6, R8", "R4 R5"),
        ("SHF.L.U64.HI R4, R5, 0x2, R6", "R4"),
        ("LOP3.LUT P0, R2, R0, 0x1f, RZ, 0xc0, !PT", "R2"),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", "R5"),
        ("ISETP.NE.AND P0, PT, R3, RZ, PT", ""),
        ("STG.E.64 desc[UR4][R2.64], R6", ""),
        ("UIADD3.64 UR6, UPT, UPT, UR4, 0x3, URZ", "UR6 UR7"),
        ("CS2R R12, SRZ", "R12 R13"),
        ("CS2R.32 R12, SR_CLOCKLO", "R12"),
        ("BAR.SYNC.DEFER_BLOCKING R4, R5", ""),
        ("SYNCS.EXCH.64 URZ, [UR5], UR6", ""),
        ("QMMA.SF.16832.F32.E4M3.E2M1.E8 R12, R16, R24, R12, R31, R33, UR6", "R12 R13 R14 R15"),
        ("EXIT", ""),
    ],
)
def test_what_an_instruction_writes(line: str, registers: str) -> None:
    (instruction,) = kernel(line)
    assert written(instruction) == tuple(parse_register(name) for name in registers.split())


def origins(lines: list[str], place: int, register: str) -> set[int | None]:
    """The addresses of the instructions from which `register` comes at the `place`-th one."""
    flow = DataFlow(kernel(*lines))
    wanted = parse_register(register)
    assert wanted is not None
    (at,) = [
        (block, index)
        for block, body in enumerate(flow.blocks)
        for index, instruction in enumerate(body)
        if instruction.address == 16 * place
    ]
    return {origin and origin.instruction.address // 16 for origin in flow.origins(*at, wanted)}


def test_the_last_writer_counts_and_one_under_a_guard_may_not_have_run() -> None:
    lines = ["MOV R4, 0x1", "@P0 MOV R4, 0x2", "MOV R5, R4", "MOV R4, 0x3", "STS [R2], R5", "EXIT"]
    assert origins(lines, 2, "R4") == {0, 1}
    assert origins(lines, 4, "R4") == {3}
    assert origins(lines, 4, "R5") == {0, 1}, "through the copy, to what it copied then"
    assert origins(lines, 4, "R2") == {None}


def test_both_ways_around_a_loop_and_past_a_branch() -> None:
    lines = ["MOV R4, 0x1", "STS [R2], R4", "@P0 BRA 0x40", "LDS R4, [R2]", "STS [R2], R4", "@P1 BRA 0x10", "EXIT"]
    assert origins(lines, 1, "R4") == {0, 3}
    assert origins(lines, 4, "R4") == {0, 3}
    rotating = ["LDS R4, [R2]", "MOV R5, R4", "MOV R4, R5", "@P0 BRA 0x10", "EXIT"]
    assert origins(rotating, 3, "R4") == {0}, "copies in a circle end"


def test_a_part_of_a_wide_value_keeps_its_place() -> None:
    instructions = kernel("LDS.128 R8, [R2]", "MOV.64 R4, R10", "STS [R2], R5", "EXIT")
    (origin,) = DataFlow(instructions).origins(0, 2, Register(file="R", number=5))
    assert origin is not None
    assert (origin.instruction.opcode, origin.part) == ("LDS.128", 3)
