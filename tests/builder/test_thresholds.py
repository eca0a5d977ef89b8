"""Limits under version control, and an impossible row of the manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from machine_code_cases import GOOD, MANIFEST, code_of

from wheelbuild import ROOT, BuildError, build
from wheelbuild.main_loop import find_main_loop
from wheelbuild.thresholds import check_wheel, load_thresholds, parse_thresholds, updated
from wheelbuild.tile_model import archs, tiles


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


def test_every_tile_of_the_manifest_has_a_limit_and_nothing_else_does() -> None:
    """SM12x's kernel, and those that SM90's layers run where a tile has them."""
    limits = load_thresholds().instructions_per_mma
    limited = {
        arch: {"plain"} if archs.mma_opcode(arch) == "QMMA.SF" else {"folded", "parallel_k"} for arch in MANIFEST.archs
    }
    assert {arch: set(kernels) for arch, kernels in limits.items()} == limited
    for arch, kernels in limits.items():
        for label, by_tile in kernels.items():
            having = [
                tile for tile in tiles.CANDIDATES if label in [kernel.label for kernel in tiles.kernels_of(tile, arch)]
            ]
            legal = {tile.name for tile in having if tiles.prove(tile, arch).legal}
            assert {tile.name for tile in MANIFEST.tiles if tile in having} <= set(by_tile) <= legal
            assert all(1 < limit < 40 for limit in by_tile.values())


def test_a_kernel_without_a_limit_has_none() -> None:
    thresholds = parse_thresholds(LIMITS)
    assert thresholds.limit("120f", "plain", "m128n128") == 3.5
    for arch, kernel, tile in (
        ("120f", "plain", "m8n8"),
        ("120f", "folded", "m128n128"),
        ("90a", "plain", "m128n128"),
    ):
        assert thresholds.limit(arch, kernel, tile) is None


def test_the_promised_limits() -> None:
    thresholds = load_thresholds()
    limits = thresholds.instructions_per_mma["120f"]["plain"]
    assert limits["m128n128"] <= 3.5
    assert limits["m256n64"] <= 3.55
    assert (thresholds.peak_mb, thresholds.wheel_bytes) == (2000, 12_000_000)


LIMITS = """# By hand
[compile]
peak_mb = 2000
[wheel]
bytes = 10
[instructions_per_mma.set."120f".plain]
m128n128 = 3.5 # promised

# Written
[instructions_per_mma.measured]
[instructions_per_mma.measured."120f".plain]
m128n128 = 9.0
m64n64 = 8.0
"""


def test_an_update_measures_anew_and_keeps_what_was_set_by_hand() -> None:
    assert parse_thresholds(LIMITS).instructions_per_mma == {"120f": {"plain": {"m128n128": 3.5, "m64n64": 8.0}}}
    figures = {"m128n128": 5.0, "m64n64": 6.0, "m64n32": 7.03}
    report = {
        "tiles": {
            name: {"archs": {"120f": {"kernels": {"plain": {"main_loop": {"instructions_per_mma": figure}}}}}}
            for name, figure in figures.items()
        }
    }
    text = updated(LIMITS, report)
    assert text.startswith(LIMITS.split('[instructions_per_mma.measured."120f".plain]')[0])
    limits = {"m128n128": 3.5, "m64n64": 6.3, "m64n32": 7.4}
    assert parse_thresholds(text).instructions_per_mma == {"120f": {"plain": limits}}
    assert updated(text, report) == text


def test_an_update_measures_every_kernel_that_has_a_table_and_no_other() -> None:
    asked = LIMITS.replace("\n# Written", '\n[instructions_per_mma.set."90a".folded]\n\n# Written')
    loops = {
        "folded": {"main_loop": {"instructions_per_mma": 20.0}},
        "plain": {"main_loop": {"instructions_per_mma": 9}},
    }
    report = {"tiles": {"m64n64": {"archs": {"90a": {"kernels": loops}}}, "m64n8": {"archs": {"90a": {"kernels": {}}}}}}
    found = parse_thresholds(updated(asked, report)).instructions_per_mma
    assert found["90a"] == {"folded": {"m64n64": 21.0}}
    assert parse_thresholds(updated(asked, {"tiles": {}})).instructions_per_mma["90a"] == {"folded": {}}


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
    plain = {"main_loop": json.loads(json.dumps(loop.report()))}
    report = {"tiles": {"m64n64": {"archs": {"120f": {"kernels": {"plain": plain}}}}}}
    assert parse_thresholds(updated(LIMITS, report)).limit("120f", "plain", "m64n64") == 2.7
