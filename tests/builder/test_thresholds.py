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
from wheelbuild.tile_model import tiles


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
        r"tile_manifest\.toml: tile 1 \(m256n256\): impossible on sm_90a for mxfp4_mxfp8: registers: 128 accumulators "
        r"per thread .* want 176 with the rest, a block of 640 threads has 112 for each",
        str(error.value),
    )


def test_every_tile_of_the_manifest_has_a_limit_and_nothing_else_does() -> None:
    limits = load_thresholds().instructions_per_mma
    assert set(limits) == set(MANIFEST.archs)
    for arch, pairs in limits.items():
        assert set(pairs) == set(tiles.kernel_pairs(arch, tiles.PAIRS))
        for pair, by_tile in pairs.items():
            legal = {tile.name for tile in tiles.CANDIDATES if tiles.prove(tile, arch, pair).legal}
            built = {
                tile.name
                for tile in MANIFEST.tiles
                for profile in MANIFEST.profiles
                if pair in tiles.kernel_pairs(arch, MANIFEST.pairs_of(profile.name, tile))
            }
            assert built <= set(by_tile) <= legal
            assert all(1 < limit < 60 for limit in by_tile.values())


def test_a_tile_without_a_limit_has_none() -> None:
    thresholds = parse_thresholds(LIMITS)
    assert thresholds.limit("120f", "mxfp4_mxfp8", "m128n128") == 3.5
    for arch, pair, tile in (
        ("120f", "mxfp4_mxfp8", "m8n8"),
        ("120f", "mxfp4_bf16", "m128n128"),
        ("90a", "mxfp4_bf16", "m128n128"),
    ):
        assert thresholds.limit(arch, pair, tile) is None


def test_the_promised_limits() -> None:
    thresholds = load_thresholds()
    limits = thresholds.instructions_per_mma["120f"]["mxfp4_mxfp8"]
    assert limits["m128n128"] <= 3.5
    assert limits["m256n64"] <= 3.55
    assert thresholds.peak_mb <= 600
    assert thresholds.wheel_bytes["mxfp4_minimal"] == 4_000_000


def test_every_profile_has_a_size() -> None:
    assert set(load_thresholds().wheel_bytes) == {profile.name for profile in MANIFEST.profiles}


LIMITS = """# By hand
[compile]
peak_mb = 2000
[wheel.bytes]
small = 10
large = 11
[instructions_per_mma.set."120f".mxfp4_mxfp8]
m128n128 = 3.5 # promised

# Written
[instructions_per_mma.measured]
[instructions_per_mma.measured."120f".mxfp4_mxfp8]
m128n128 = 9.0
m64n64 = 8.0
"""


def of_loop(figure: float) -> dict[str, object]:
    return {"main_loop": {"instructions_per_mma": figure}}


def test_an_update_measures_anew_and_keeps_what_was_set_by_hand() -> None:
    assert parse_thresholds(LIMITS).instructions_per_mma == {"120f": {"mxfp4_mxfp8": {"m128n128": 3.5, "m64n64": 8.0}}}
    figures = {"m128n128": 5.0, "m64n64": 6.0, "m64n32": 7.03}
    report = {
        "tiles": {name: {"archs": {"120f": {"mxfp4_mxfp8": of_loop(figure)}}} for name, figure in figures.items()}
    }
    text = updated(LIMITS, report)
    assert text.startswith(LIMITS.split('[instructions_per_mma.measured."120f".mxfp4_mxfp8]')[0])
    limits = {"m128n128": 3.5, "m64n64": 6.3, "m64n32": 7.4}
    assert parse_thresholds(text).instructions_per_mma == {"120f": {"mxfp4_mxfp8": limits}}
    assert updated(text, report) == text


def test_an_update_measures_every_arch_that_has_a_table_and_no_other() -> None:
    asked = LIMITS.replace("\n# Written", '\n[instructions_per_mma.set."90a".mxfp4_bf16]\n\n# Written')
    report = {
        "tiles": {
            "m64n64": {"archs": {"90a": {"mxfp4_bf16": of_loop(20.0)}, "121a": {"mxfp4_mxfp8": of_loop(3.0)}}},
            "m64n8": {"archs": {"121a": {"mxfp4_mxfp8": of_loop(9.0)}}},
        }
    }
    assert parse_thresholds(updated(asked, report)).instructions_per_mma == {
        "120f": {"mxfp4_mxfp8": {"m128n128": 3.5, "m64n64": 8.0}},
        "90a": {"mxfp4_bf16": {"m64n64": 21.0}},
    }, "a pair that the report lacks keeps its limits"
    assert parse_thresholds(updated(asked, {"tiles": {}})).instructions_per_mma["90a"] == {"mxfp4_bf16": {}}


@pytest.mark.parametrize("text", ["[compile", "[compile]\n", LIMITS.replace("peak_mb", "peak"), "compile = 1\n"])
def test_a_threshold_file_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(BuildError, match=r"^ci/thresholds\.toml: not what wheelbuild\.thresholds reads: "):
        parse_thresholds(text)


def test_a_wheel_that_is_too_large_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"0" * 10)
    check_wheel(wheel, "small", parse_thresholds(LIMITS))
    wheel.write_bytes(b"0" * 11)
    check_wheel(wheel, "large", parse_thresholds(LIMITS))
    words = r"^x\.whl has 11 bytes, at most 10 allowed with profile small \(ci/thresholds\.toml\)$"
    with pytest.raises(BuildError, match=words):
        check_wheel(wheel, "small", parse_thresholds(LIMITS))


def test_a_wheel_of_a_profile_without_a_size_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"")
    words = r"^ci/thresholds\.toml has no size for a wheel of profile other: state one in \[wheel\.bytes\]$"
    with pytest.raises(BuildError, match=words):
        check_wheel(wheel, "other", parse_thresholds(LIMITS))


def test_a_report_is_json_that_thresholds_read(tmp_path: Path) -> None:
    loop = find_main_loop(next(iter(code_of(*GOOD).kernels.values())), "HMMA")[0]
    assert loop is not None
    built = {"main_loop": json.loads(json.dumps(loop.report()))}
    report = {"tiles": {"m64n64": {"archs": {"120f": {"mxfp4_mxfp8": built}}}}}
    assert parse_thresholds(updated(LIMITS, report)).limit("120f", "mxfp4_mxfp8", "m64n64") == 2.7
