"""The check of what block-scaled MMAs read, for those of FP4 by FP4: as test_block_scaled.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from block_scaled_cases import ARCH, Mma, assembled, defining

from wheelbuild import ROOT, BuildError
from wheelbuild.block_scaled import check_block_scaled
from wheelbuild.kernel_ptx import compile_to_ptx
from wheelbuild.plan import block_scaled
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import Cuda, package_dirs, resolve_cuda

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")
NATIVE, SWAPPED = MANIFEST.tile("m64n8"), MANIFEST.tile("m8n64_swap")
KERNELS = [(NATIVE, "mxfp4_mxfp4"), (SWAPPED, "mxfp4_mxfp4"), (SWAPPED, "nvfp4_nvfp4"), (NATIVE, "nvfp4_nvfp4")]
kernels = pytest.mark.parametrize(("tile", "pair"), KERNELS, ids=lambda value: getattr(value, "name", value))


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return resolve_cuda(os.environ, package_dirs(os.environ), [ARCH])


@cache
def ptx_of(tile: tiles.Tile, pair: str) -> str:
    return compile_to_ptx(tile, ARCH, pair)


def is_nvfp4(ptx: str) -> bool:
    return "mxf4nvf4" in ptx


def weights_are_a(ptx: str) -> bool:
    return "ld.shared.v2.u32" in ptx


def weights(ptx: str, place: int) -> list[str]:
    mma = Mma(ptx, place)
    return mma.a if weights_are_a(ptx) else mma.b


@kernels
def test_the_assembled_tile_passes(tile: tiles.Tile, pair: str, cuda: Cuda, tmp_path: Path) -> None:
    expect = block_scaled(tile, ARCH, pair)
    assert expect["weights"] == ("A" if tile.n >= 64 else "B")
    code = assembled(ptx_of(tile, pair), cuda, tmp_path)
    found = check_block_scaled("x.so", ARCH, code, expect)
    assert found["mma"] == code.count("OMMA.SF") > 0
    half = found["mma"] // 2
    assert found["selectors"] == ({"0x00": half, "0x12": half} if pair == "mxfp4_mxfp4" else {"0x00": found["mma"]})


# ---- mistakes, assembled ---------------------------------------------------------------------------------------------


def another_selector(ptx: str) -> str:
    return Mma(ptx, 1).having(selector_a="{0,0}", selector_b="{0,0}")


def another_half_of_one_word(ptx: str) -> str:
    return Mma(ptx, 1).having(selector_a="{0,0}")


def another_thread(ptx: str) -> str:
    selector = Mma(ptx, 0).selector_b
    return Mma(ptx, 0).having(selector_b=selector.replace(",0", ",1"))


def steps_exchanged(ptx: str) -> str:
    mma = Mma(ptx, 0)
    return mma.having(a=mma.a[2:] + mma.a[:2]) if weights_are_a(ptx) else mma.having(b=mma.b[::-1])


def rows_of_two_steps_mixed(ptx: str) -> str:
    mma = Mma(ptx, 0)
    return mma.having(a=[mma.a[0], mma.a[2], mma.a[1], mma.a[3]])


def weights_that_were_changed(ptx: str) -> str:
    mma = Mma(ptx, 0)
    name, registers = ("a", mma.a) if weights_are_a(ptx) else ("b", mma.b)
    before = f"{{ .reg .b32 less; and.b32 less, {registers[0]}, 0x77777777; "
    return mma.having(before=before, after=" }", **{name: ["less", *registers[1:]]})


def activations_that_were_changed(ptx: str) -> str:
    mma = Mma(ptx, 0)
    name, registers = ("b", mma.b) if weights_are_a(ptx) else ("a", mma.a)
    before = f"{{ .reg .b32 less; and.b32 less, {registers[0]}, 0x77777777; "
    return mma.having(before=before, after=" }", **{name: ["less", *registers[1:]]})


def scales_exchanged(ptx: str) -> str:
    mma = Mma(ptx, 0)
    return mma.having(scale_a=mma.scale_b, scale_b=mma.scale_a)


def scales_of_the_other_set(ptx: str) -> str:
    """Of both operands; of one alone below."""
    one, other = Mma(ptx, 0), Mma(ptx, 1)
    text = one.having(scale_a=other.scale_a, scale_b=other.scale_b)
    moved = "".join(defining(ptx, name, "ld.shared.u32") for name in (other.scale_a, other.scale_b))
    return text[: one.match.start()] + moved + text[one.match.start() :]


def a_row_scale_of_the_other_set(ptx: str) -> str:
    one, other = Mma(ptx, 0), Mma(ptx, 1)
    name = "scale_b" if weights_are_a(ptx) else "scale_a"
    text = one.having(**{name: getattr(other, name)})
    return text[: one.match.start()] + defining(ptx, getattr(other, name), "ld.shared.u32") + text[one.match.start() :]


def a_scale_of_another_stage(ptx: str) -> str:
    mma = Mma(ptx, 0)
    statement = defining(ptx, mma.scale_a, "ld.shared.u32")
    offset = int(statement.split("+")[1].rstrip("];"))
    block = 4608 if is_nvfp4(ptx) else 4352
    stage = block if weights_are_a(ptx) else 640 if is_nvfp4(ptx) else 384  # of weights, of activations' scales
    return ptx.replace(statement, statement.replace(str(offset), str(offset + stage)))


def codes_from_where_scales_are(ptx: str) -> str:
    return re.sub(rf"(ld\.shared\S+\s+[^;]*)\+{512 if is_nvfp4(ptx) else 256}\]", r"\1]", ptx, count=1)


def accumulators_that_were_changed(ptx: str) -> str:
    mma = Mma(ptx, 0)
    register = mma.c.strip("{}").split(",")[0]
    return mma.having(before=f"add.f32 {register}, {register}, 0f3F800000; ")


MX, NV = KERNELS[:2], KERNELS[2:]
MISTAKES: list[tuple[Callable[[str], str], list[tuple[tiles.Tile, str]], str]] = [
    (another_selector, MX, r"has selector 0x00 for weights of step 2, expected 0x12$"),
    (another_half_of_one_word, MX, r"has selector 0x10, expected one of 0x00, 0x12: the same byte of both"),
    (another_thread, KERNELS, r"has selector 0x20, expected one of 0x00(, 0x12)?: the same byte of both"),
    (steps_exchanged, KERNELS, r"takes [AB] from steps 1 and 0, expected an even one and the next$"),
    (rows_of_two_steps_mixed, [KERNELS[1]], r"takes half of A of more than one step \(0, 1\), expected the same on"),
    (weights_that_were_changed, KERNELS, r"takes [AB] from LOP3\.LUT.*, expected LDS of whole words of weights, and"),
    (activations_that_were_changed, KERNELS, r"takes [AB] from LOP3\.LUT.*, expected LDSM of whole words of act"),
    (scales_exchanged, KERNELS, r"takes SF[AB] from LDS.*, expected an address among the weight scales; there are act"),
    (scales_of_the_other_set, NV, r"takes SF[AB] from set 1 of the weight scales, expected 0$"),
    (a_row_scale_of_the_other_set, NV, r"takes SF[AB] from set 1 of the activation scales, expected 0$"),
    (a_scale_of_another_stage, KERNELS, r"takes its operands of more than one stage \(0, 1\), expected the same on"),
    (codes_from_where_scales_are, KERNELS, r"takes [AB] from LDS.*, expected an address among the weights; there are"),
    (accumulators_that_were_changed, [KERNELS[0]], r"takes C from FADD.*, expected OMMA\.SF or zero$"),
]


@pytest.mark.parametrize(
    ("mistake", "tile", "pair", "sentence"),
    [
        pytest.param(mistake, tile, pair, sentence, id=f"{mistake.__name__}-{tile.name}-{pair}")
        for mistake, having, sentence in MISTAKES
        for tile, pair in having[:2]
    ],
)
def test_a_mistake_is_refused(
    mistake: Callable[[str], str], tile: tiles.Tile, pair: str, sentence: str, cuda: Cuda, tmp_path: Path
) -> None:
    code = assembled(mistake(ptx_of(tile, pair)), cuda, tmp_path)
    with pytest.raises(BuildError, match=rf"^x\.so on sm_120f: OMMA\.SF at 0x\w+ {sentence}"):
        check_block_scaled("x.so", ARCH, code, block_scaled(tile, ARCH, pair))
