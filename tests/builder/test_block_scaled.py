"""The check of what block-scaled MMAs read: it passes every tile of the wheel, and refuses each mistake by name.

Mistakes are made in a tile's PTX, one at a time, and assembled: what is read is what ptxas makes of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from block_scaled_cases import ARCH, Mma, assembled, defining, read

import mxfp4_moe
from wheelbuild import ROOT, BuildError
from wheelbuild.block_scaled import SharedMemory, check_block_scaled
from wheelbuild.kernel_ptx import compile_to_ptx
from wheelbuild.machine_code import Code, parse_sass
from wheelbuild.plan import block_scaled
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import Cuda, package_dirs, resolve_cuda

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")
NATIVE, SWAPPED = MANIFEST.tile("m64n8"), MANIFEST.tile("m8n64_swap")


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return resolve_cuda(os.environ, package_dirs(os.environ), [ARCH])


# ---- every tile of the wheel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", MANIFEST.tiles, ids=lambda tile: tile.name)
def test_every_tiles_mmas_read_what_they_should(tile: tiles.Tile, cuda: Cuda) -> None:
    package = Path(mxfp4_moe.__file__).parent
    code = read(cuda, package / "_ext" / f"{tile.module}.abi3.so")
    found = check_block_scaled(tile.name, ARCH, code, block_scaled(tile, ARCH))
    assert found["types"] == ("E2M1.E4M3" if tile.swap_ab else "E4M3.E2M1")
    assert found["mma"] == code.count("QMMA.SF") > 0
    assert found["selectors"] == dict.fromkeys(("0x00", "0x09", "0x12", "0x1b"), found["mma"] // 4)
    report = json.loads((package / "build_report.json").read_text(encoding="utf-8"))
    assert report["tiles"][tile.name]["archs"][ARCH]["mxfp4_mxfp8"]["block_scaled"] == found


# ---- mistakes, assembled ---------------------------------------------------------------------------------------------


@cache
def ptx_of(tile: tiles.Tile) -> str:
    return compile_to_ptx(tile, ARCH)


def another_selector(ptx: str) -> str:
    return Mma(ptx, 1).having(selector_a="{2,0}", selector_b="{2,0}")


def another_byte_of_one_scale(ptx: str) -> str:
    return Mma(ptx, 1).having(selector_a="{2,0}")


def another_thread(ptx: str) -> str:
    return Mma(ptx, 1).having(selector_b="{1,1}")


def a_selector_known_at_run_time(ptx: str) -> str:
    read = "{ .reg .b32 lane; .reg .u16 byte; mov.u32 lane, %laneid; cvt.u16.u32 byte, lane; "
    return Mma(ptx, 1).having(before=read, selector_a="{byte,0}", after=" }")


def another_mask(ptx: str) -> str:
    return ptx.replace(str(0x3C3C3C3C), str(0x3F3F3F3F))


def no_mask(ptx: str) -> str:
    mma = Mma(ptx, 0)
    (fp4,) = (regs for regs in (mma.a, mma.b) if str(0x3C3C3C3C) in ptx and f"and.b32  \t{regs[0]}, " in ptx)
    statement = defining(ptx, fp4[0], "and.b32")
    return ptx.replace(statement, statement.replace("and.b32", "mov.b32").replace(f", {0x3C3C3C3C}", ""))


def another_rotation(ptx: str) -> str:
    return ptx.replace("shf.r.wrap.b32", "shf.l.wrap.b32")


def no_rotation(ptx: str) -> str:
    return re.sub(r"shf\.r\.wrap\.b32 (%r\d+), (%r\d+), %r\d+, %r\d+;", r"mov.b32 \1, \2;", ptx)


def even_and_odd_exchanged(ptx: str) -> str:
    mma = Mma(ptx, 0)
    return mma.having(a=mma.a[2:] + mma.a[:2]) if "e2m1.e4m3" in ptx else mma.having(b=mma.b[::-1])


def scales_exchanged(ptx: str) -> str:
    mma = Mma(ptx, 0)
    return mma.having(scale_a=mma.scale_b, scale_b=mma.scale_a)


def a_scale_that_was_computed(ptx: str) -> str:
    mma = Mma(ptx, 0)
    before = f"{{ .reg .b32 sum; add.s32 sum, {mma.scale_a}, 1; "
    return mma.having(before=before, scale_a="sum", after=" }")


def a_scale_of_less_than_a_word(ptx: str) -> str:
    statement = defining(ptx, Mma(ptx, 0).scale_a, "ld.shared.u32")
    return ptx.replace(statement, statement.replace(".u32", ".u8"))


def a_scale_of_another_stage(ptx: str) -> str:
    mma = Mma(ptx, 0)
    statement = defining(ptx, mma.scale_a, "ld.shared.u32")
    offset = int(statement.split("+")[1].rstrip("];"))
    stage = 4352 if "e2m1.e4m3" in ptx else 384  # of weights, of activations' scales
    return ptx.replace(statement, statement.replace(str(offset), str(offset + stage)))


def codes_from_where_scales_are(ptx: str) -> str:
    return re.sub(r"(ld\.shared\S+\s+[^;]*)\+256\]", r"\1]", ptx, count=1)


def activations_that_were_changed(ptx: str) -> str:
    mma = Mma(ptx, 0)
    name, registers = ("b", mma.b) if "e2m1.e4m3" in ptx else ("a", mma.a)
    before = f"{{ .reg .b32 less; and.b32 less, {registers[0]}, 0x7f7f7f7f; "
    return mma.having(before=before, after=" }", **{name: ["less", *registers[1:]]})


def accumulators_that_were_changed(ptx: str) -> str:
    mma = Mma(ptx, 0)
    register = mma.c.strip("{}").split(",")[0]
    return mma.having(before=f"add.f32 {register}, {register}, 0f3F800000; ")


MISTAKES: list[tuple[Callable[[str], str], str]] = [
    (another_selector, r"has selector 0x12 for weights of step 1 \(LDS.* at 0x\w+\), expected 0x09$"),
    (another_byte_of_one_scale, r"has selector 0x0a, expected one of 0x00, 0x09, 0x12, 0x1b: the same byte of both"),
    (another_thread, r"has selector 0x29, expected one of 0x00, 0x09, 0x12, 0x1b"),
    (a_selector_known_at_run_time, r"takes the selector from \w+.*, expected UMOV of a constant$"),
    (
        another_mask,
        r"takes [AB] from LOP3\.LUT .*0x3f3f3f3f.*, expected LOP3\.LUT with 0x3c3c3c3c, which leaves bits 5",
    ),
    (no_mask, r"takes [AB] from LDS.*, expected LOP3\.LUT with 0x3c3c3c3c"),
    (another_rotation, r"takes [AB] from SHF\.L\.W\.U32.*, expected a word of codes, rotated right by 4$"),
    (no_rotation, r"takes [AB] from LDS.*, expected a word of codes, rotated right by 4$"),
    (even_and_odd_exchanged, r"takes [AB] from SHF\.R\.W\.U32.*, expected a word of codes as it was loaded$"),
    (
        scales_exchanged,
        r"takes SF[AB] from LDS.*, expected an address among the weight scales; there are activation sc",
    ),
    (
        a_scale_that_was_computed,
        r"takes SFA from IADD3.*, expected LDS of whole words of .* scales, and nothing between",
    ),
    (a_scale_of_less_than_a_word, r"takes SFA from LDS\.U8.*, expected LDS of whole words of .* scales"),
    (a_scale_of_another_stage, r"takes its operands of more than one stage \(0, 1\), expected the same on every path$"),
    (
        codes_from_where_scales_are,
        r"takes [AB] from LDS.*, expected an address among the weights; there are weight sca",
    ),
    (activations_that_were_changed, r"takes [AB] from LOP3\.LUT.*, expected LDSM of whole words of activations, and"),
    (accumulators_that_were_changed, r"takes C from FADD.*, expected QMMA\.SF or zero$"),
]


@pytest.mark.parametrize("tile", [NATIVE, SWAPPED], ids=lambda tile: tile.name)
def test_the_assembled_tile_passes(tile: tiles.Tile, cuda: Cuda, tmp_path: Path) -> None:
    check_block_scaled("x.so", ARCH, assembled(ptx_of(tile), cuda, tmp_path), block_scaled(tile, ARCH))


@pytest.mark.parametrize("tile", [NATIVE, SWAPPED], ids=lambda tile: tile.name)
@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mistake_is_refused(
    mistake: Callable[[str], str], sentence: str, tile: tiles.Tile, cuda: Cuda, tmp_path: Path
) -> None:
    code = assembled(mistake(ptx_of(tile)), cuda, tmp_path)
    with pytest.raises(BuildError, match=rf"^x\.so on sm_120f: QMMA\.SF at 0x\w+ {sentence}"):
        check_block_scaled("x.so", ARCH, code, block_scaled(tile, ARCH))


# ---- mistakes, written down ------------------------------------------------------------------------------------------

# Two stages of 8 rows of activations (1,024 bytes), a block of weights (4,352) and activation scales (128).
EXPECT: dict[str, Any] = {
    **{"pair": "mxfp4_mxfp8", "weights": "B"},
    "shared_memory": {"stages": 2, "act_bytes": 1024, "weight_bytes": 4352, "act_scale_bytes": 128}
    | {"block_bytes": 4352, "block_scale_bytes": 256, "act_scale_set_bytes": 48},
}
WEIGHTS, ACT_SCALES = 0x800, 0x800 + 2 * 4352
NAME = "QMMA.SF.16832.F32.E4M3.E2M1.E8"


def k_step(step: int) -> list[str]:
    return [
        "LDSM.16.M88.4 R16, [R2+UR5+0x400]",
        f"LDS R40, [R3+UR5+0x{WEIGHTS + 4352 + 256 + step * 1024:x}]",
        "LOP3.LUT R24, R40, 0x3c3c3c3c, RZ, 0xc0, !PT",
        "SHF.R.W.U32 R41, R40.reuse, 0x4, R40",
        "LOP3.LUT R25, R41, 0x3c3c3c3c, RZ, 0xc0, !PT",
        f"UMOV UR6, 0x{(0x00, 0x09, 0x12, 0x1B)[step]:x}",
        f"{NAME} R12, R16, R24, R12, R31, R33, UR6",
    ]


K_TILE = [
    "CS2R R12, SRZ",
    "CS2R R14, SRZ",
    f"LDS R31, [R4+0x{ACT_SCALES + 128:x}]",
    f"LDS.64 R28, [R3+UR5+0x{WEIGHTS + 4352:x}]",
    "MOV R33, R29",
    *(line for step in range(4) for line in k_step(step)),
    "@P0 BRA 0x20",
    "EXIT",
]


def kernel(*lines: str) -> Code:
    listing = "\n".join(f"  /*{16 * place:04x}*/  {line} ;" for place, line in enumerate(lines))
    return parse_sass(f"arch = sm_{ARCH}\n\t\tFunction : k\n{listing}\n")[ARCH]


def changed(old: str, new: str, place: int = 0) -> list[str]:
    """The K tile with another line instead of the `place`-th that begins with `old`."""
    found = [index for index, line in enumerate(K_TILE) if line.startswith(old)][place]
    return [*K_TILE[:found], *([new] if new else []), *K_TILE[found + 1 :]]


def test_a_k_tile_passes_and_is_counted() -> None:
    assert check_block_scaled("x.so", ARCH, kernel(*K_TILE), EXPECT) == {
        "mma": 4,
        "types": "E4M3.E2M1",
        "selectors": {"0x00": 1, "0x09": 1, "0x12": 1, "0x1b": 1},
    }
    zero = changed("UMOV UR6, 0x0", "NOP")
    zero = [
        line.replace("UR6", "URZ") if line.startswith(NAME) and place < 12 else line for place, line in enumerate(zero)
    ]
    check_block_scaled("x.so", ARCH, kernel(*zero), EXPECT)


@pytest.mark.parametrize(
    ("lines", "expect", "sentence"),
    [
        (
            K_TILE,
            {"weights": "A"},
            rf"is {NAME}, expected QMMA\.SF\.16832\.F32\.E2M1\.E4M3\.E8: this tile's weights are A$",
        ),
        (
            changed(NAME, f"{NAME} R12, R16, R24, R12, R31, R33"),
            {},
            "has 6 operands, expected D, A, B, C, SFA, SFB, the s",
        ),
        (changed(NAME, f"{NAME} R12, R16, R24, R12, RZ, R33, UR6"), {}, "has RZ as SFA, expected a register$"),
        (
            changed("LDS R31", "@P1 LDS R31, [R4+0x2a80]"),
            {},
            "takes SFA from a register that nothing has written on one",
        ),
        (
            changed("MOV R33", "IADD3 R33, PT, PT, R29, R5, RZ"),
            {},
            "takes SFB from IADD3 R33, .* at 0x40, expected LDS of",
        ),
        (
            changed("LDS.64", "LDS.64 R28, [R3+UR5+0x2a80]"),
            {},
            "takes SFB .*, expected an address among the weight scales;",
        ),
        (
            changed("LDS R31", "LDS R31, [R4+0x9000]"),
            {},
            "takes SFA .*, expected an address among .*; there are no operand$",
        ),
        (
            changed("SHF", "SHF.R.W.U32 R41, R28, 0x4, R28"),
            {},
            "takes the even and the odd k of B from different words$",
        ),
        (
            changed("SHF", "SHF.R.W.U32 R41, R40, 0x4, R28"),
            {},
            "takes B from SHF.*, expected a word of codes, rotated right",
        ),
        (
            changed("LDSM", "LDS.128 R16, [R2+UR5+0x400]"),
            {},
            "takes A from LDS.128 .*, expected LDSM of whole words of act",
        ),
        (
            changed("LDSM", "LDSM.16.M88.2 R16, [R2+UR5+0x400]"),
            {},
            "takes A from a register that nothing has written on one",
        ),
        (
            changed("LDSM", "LDSM.16.M88.4 R16, [R2+UR5]"),
            {},
            r"takes its operands of more than one stage \(0, 1\), expected",
        ),
        (changed("LDSM", "UMOV UR6, 0x0"), {}, "takes A from a register that nothing has written on one path$"),
        (changed("CS2R", "MOV R12, R5"), {}, "takes C from a register that nothing has written on one path$"),
        (changed("CS2R", "FADD R12, R5, R5"), {}, r"takes C from FADD R12, R5, R5 at 0x0, expected QMMA\.SF or zero$"),
        (
            changed("UMOV UR6, 0x9", "@P1 UMOV UR6, 0x9"),
            {},
            r"takes the selector of more than one constant \(0, 9\), expected the same on every path$",
        ),
        (
            changed("UMOV UR6, 0x9", "R2UR UR6, R5"),
            {},
            r"takes the selector from R2UR UR6, R5 at 0x110, expected UMOV of",
        ),
        (
            changed("UMOV UR6, 0x9", "UMOV UR6, 0x1"),
            {},
            r"has selector 0x01, expected one of 0x00, 0x09, 0x12, 0x1b: the s",
        ),
        (changed("UMOV UR6, 0x9", "UMOV UR6, 0x0"), {}, r"has selector 0x00 for weights of step 1 .*, expected 0x09$"),
    ],
)
def test_a_k_tile_with_a_mistake_is_refused(lines: list[str], expect: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BuildError, match=rf"^x\.so on sm_120f: QMMA\.SF at 0x\w+ {sentence}"):
        check_block_scaled("x.so", ARCH, kernel(*lines), EXPECT | expect)


def test_a_step_that_is_missing_is_told() -> None:
    counts = "1 have step 0, 1 have step 1, 0 have step 2, 1 have step 3"
    message = f"of 3 QMMA.SF {counts}; expected as many each, one step of a K tile"
    with pytest.raises(BuildError, match=f"^x.so on sm_120f: {message}"):
        check_block_scaled("x.so", ARCH, kernel(*changed(NAME, "NOP", 2)), EXPECT)


def test_the_parts_of_shared_memory() -> None:
    memory = SharedMemory(**EXPECT["shared_memory"])
    assert [memory.locate(byte) for byte in (0, 0x7FF, WEIGHTS + 255, WEIGHTS + 256, WEIGHTS + 4352 + 256 + 3072)] == [
        ("activations", 0, 0),
        ("activations", 1, 0),
        ("weight scales", 0, 0),
        ("weights", 0, 0),
        ("weights", 1, 3),
    ]
    assert memory.locate(ACT_SCALES + 128) == ("activation scales", 1, 0)
    assert memory.locate(ACT_SCALES + 256) == memory.locate(-4) == ("no operand", 0, 0)
