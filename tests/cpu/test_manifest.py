"""The manifest: what it has, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from tile_cases import ARCHS, CANDIDATES, ROOT

from mxfp4_moe import tiles
from mxfp4_moe.tiles import ManifestError, Tile

MANIFEST_TEXT = (ROOT / "tile_manifest.toml").read_text(encoding="utf-8")
HEAD = """
archs = ["90a", "120f"]
default_profile = "plain"
[profile.plain]
pairs = ["mxfp4_mxfp8"]
out_dtypes = ["bfloat16"]
"""


def row(m: object = 128, n: object = 128, swap_ab: object = "false", more: str = "") -> str:
    return f"[[tile]]\nm = {m}\nn = {n}\nswap_ab = {swap_ab}\n{more}\n"


def test_the_wheels_manifest_has_the_tiles_that_are_promised() -> None:
    manifest = tiles.load_manifest()
    assert {(64, 128), (128, 128), (256, 64), (8, 128), (16, 128), (32, 128)} <= {tile.mn for tile in manifest.tiles}
    assert manifest.archs == ARCHS
    assert manifest.default_profile == "full"
    assert [profile.name for profile in manifest.profiles] == ["mxfp4_minimal", "full"]
    assert manifest.profile("mxfp4_minimal").out_dtypes == ("bfloat16", "float16")


def test_the_packages_manifest_is_the_source_trees() -> None:
    assert tiles.manifest_path().read_text(encoding="utf-8") == MANIFEST_TEXT


def test_names_tell_shape_and_mode() -> None:
    assert Tile(m=128, n=64, swap_ab=False).name == "m128n64"
    assert Tile(m=8, n=128, swap_ab=True).name == "m8n128_swap"
    assert Tile(m=8, n=128, swap_ab=True).module == "tile_m8n128_swap"
    assert Tile.from_mn((32, 64)) == Tile(m=32, n=64, swap_ab=True)
    assert Tile.from_mn((64, 64)) == Tile(m=64, n=64, swap_ab=False)
    assert len({tile.name for tile in CANDIDATES}) == 27
    assert sorted(tiles.CANDIDATES) == sorted(CANDIDATES)


def test_lookup_by_name_lists_what_there_is() -> None:
    manifest = tiles.parse_manifest(HEAD + row())
    assert manifest.tile("m128n128") == Tile(m=128, n=128, swap_ab=False)
    with pytest.raises(ManifestError, match=r"tile 'm1n1': expected one of m128n128$"):
        manifest.tile("m1n1")
    with pytest.raises(ManifestError, match=r"profile 'other': expected one of plain$"):
        manifest.profile("other")


def test_a_row_without_pairs_is_built_for_all_of_a_profiles_and_one_with_them_for_those() -> None:
    both = '[profile.big]\npairs = ["mxfp4_mxfp8", "mxfp4_bf16"]\nout_dtypes = ["bfloat16"]\n'
    manifest = tiles.parse_manifest(HEAD + both + row() + row(m=256, n=8, more='pairs = ["mxfp4_mxfp8"]'))
    any_pair, one = manifest.tiles
    assert manifest.pairs_of("plain", any_pair) == manifest.pairs_of("plain", one) == ("mxfp4_mxfp8",)
    assert manifest.pairs_of("big", any_pair) == ("mxfp4_mxfp8", "mxfp4_bf16")
    assert manifest.pairs_of("big", one) == ("mxfp4_mxfp8",)


def test_the_wheels_pairs() -> None:
    """`full` has each pair for each tile that can have it, and no more."""
    manifest = tiles.load_manifest()
    assert manifest.profile("mxfp4_minimal").pairs == ("mxfp4_mxfp8",)
    assert manifest.profile("full").pairs == tiles.PAIRS
    for tile in manifest.tiles:
        assert manifest.pairs_of("mxfp4_minimal", tile) == ("mxfp4_mxfp8",)
        for pair in tiles.PAIRS:
            legal = all(tiles.prove(tile, arch, pair).legal for arch in manifest.archs)
            assert (pair in manifest.pairs_of("full", tile)) == legal
            halves = pair in tiles.HALF_PAIRS
            few = not halves or (tile.m < 256 and (tile.mn != (128, 256) or pair.startswith("mxfp4")))
            assert legal == few, (tile, pair)


def test_what_kernels_read() -> None:
    """SM90's MMA takes no scales: one kernel, of bf16 operands, for each format of weights, and those of fp16."""
    assert tiles.kernel_pairs("90a", ["mxfp4_mxfp8"]) == ("mxfp4_bf16",)
    assert tiles.kernel_pairs("90a", tiles.PAIRS) == ("mxfp4_bf16", "nvfp4_bf16", "mxfp4_fp16", "nvfp4_fp16")
    assert tiles.kernel_pairs("120f", tiles.PAIRS) == tiles.PAIRS
    reads = {"mxfp4_mxfp8": "mxfp4_bf16", "mxfp4_mxfp4": "mxfp4_bf16", "nvfp4_nvfp4": "nvfp4_bf16"}
    for pair in tiles.PAIRS:
        assert tiles.kernel_pair("90a", pair) == reads.get(pair, pair)
    with pytest.raises(ValueError, match="pair: expected one of mxfp4_mxfp8, mxfp4_bf16, .*, got 'bf16'"):
        tiles.prove(Tile(m=64, n=64, swap_ab=False), "120f", "bf16")


def test_a_profile_says_in_one_sentence_what_it_lacks() -> None:
    more = '[profile.big]\npairs = ["mxfp4_mxfp8", "mxfp4_bf16"]\nout_dtypes = ["bfloat16"]\n'
    manifest = tiles.parse_manifest(HEAD + more + row())
    assert manifest.refusal("plain", "mxfp4_mxfp8") is None
    assert manifest.refusal("big", "mxfp4_bf16") is None
    assert manifest.refusal("plain", "mxfp4_bf16") == (
        "quantization 'mxfp4_bf16' is not in this wheel's profile 'plain' (it has mxfp4_mxfp8): install a wheel built "
        "with MXFP4_MOE_BUILD_PROFILE=big"
    )
    assert str(manifest.refusal("plain", "int4")).endswith("no profile has it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("archs = [", "not valid TOML"),
        (HEAD, "key 'tile' is missing"),
        (HEAD + row() + "[[tiles]]\nm = 8\n", "unknown key 'tiles'"),
        (HEAD.replace("[profile", "tile = 3\n[profile"), r"one or more \[\[tile\]\] tables, got 3"),
        (HEAD.replace("[profile", "tile = []\n[profile"), r"one or more \[\[tile\]\] tables, got \[\]"),
        (HEAD.replace('"90a", ', '"90", ') + row(), r"arch '90': the kernel has an MMA for 90a, 120f"),
        (HEAD.replace('"120f"', '"120"') + row(), r"arch '120': .* does not exist under the plain suffix"),
        (HEAD.replace('"120f"', '"sm120f"') + row(), r"arch 'sm120f': expected digits and a suffix"),
        (HEAD.replace('["90a", "120f"]', '["90a", "90a"]') + row(), r"archs: duplicates in \['90a', '90a'\]"),
        (HEAD.replace('["90a", "120f"]', '"90a"') + row(), r"archs: expected a list of one or more strings, got '90a'"),
        (HEAD.replace('["90a", "120f"]', "[]") + row(), r"archs: expected a list of one or more strings, got \[\]"),
        (HEAD.replace('= "plain"', '= "fancy"') + row(), "default_profile: expected one of plain, got 'fancy'"),
        (HEAD.replace("out_dtypes", "outputs") + row(), "profile 'plain': unknown key 'outputs'"),
        (HEAD.replace('["bfloat16"]', '"bfloat16"') + row(), "profile 'plain': out_dtypes: expected a list"),
        (
            HEAD.replace('["mxfp4_mxfp8"]', '["mxfp8_mxfp4"]') + row(),
            "pairs: expected pairs among mxfp4_mxfp8, mxfp4_bf16, ",
        ),
        (HEAD.replace("pairs", "quantization") + row(), "profile 'plain': unknown key 'quantization'"),
        (HEAD + row(more='pairs = ["x"]'), r"tile 1 \(m128n128\): pairs: expected pairs among .*, got 'x'"),
        (HEAD + row(more="pairs = []"), r"tile 1 \(m128n128\): pairs: expected a list of one or more strings"),
        (
            HEAD + row(more='pairs = ["mxfp4_bf16"]'),
            r"tile 1 .*: pairs: expected one of profile plain's at least, got none",
        ),
        (
            HEAD.replace('"mxfp4_mxfp8"]', '"mxfp4_mxfp8", "mxfp4_bf16"]') + row(m=256, n=8),
            r"tile 1 \(m256n8\): impossible on sm_120f for mxfp4_bf16: .* 139,808 bytes .*, a block has 101,376",
        ),
        (HEAD + row() + row(m=64, more="k = 128"), r"tile 2 .*: unknown key 'k', expected only m, n, swap_ab"),
        (HEAD + "[[tile]]\nm = 64\nn = 128\n", r"tile 1 .*: key 'swap_ab' is missing"),
        (HEAD + row(m='"128"'), r"tile 1 .*: m must be an integer, got '128'"),
        (HEAD + row(m="true"), r"tile 1 .*: m must be an integer, got True"),
        (HEAD + row(n="128.0"), r"tile 1 .*: n must be an integer, got 128.0"),
        (HEAD + row(swap_ab="0"), r"tile 1 .*: swap_ab must be true or false, got 0"),
        (HEAD + row() + row(m=64) + row(), r"tile 3 \(m128n128\): duplicate of tile 1$"),
        (
            HEAD + row(m=100),
            r"tile 1 \(m100n128\): impossible on sm_90a for mxfp4_mxfp8: .* m divisible by 64, not 100",
        ),
        (
            HEAD + row() + row(m=256, n=256),
            r"tile 2 \(m256n256\): impossible on sm_90a for mxfp4_mxfp8: registers: 128 accumulators",
        ),
        (
            HEAD.replace('"90a", ', "") + row(m=256, n=256),
            r"tile 1 \(m256n256\): impossible on sm_120f for mxfp4_mxfp8: .*102,688 bytes.*101,376",
        ),
        (
            HEAD + row(m=192, n=256),
            r"tile 1 \(m192n256\): impossible on sm_90a for mxfp4_mxfp8: registers: 96 accumulators",
        ),
        (
            HEAD + row(m=8),
            r"tile 1 \(m8n128\): impossible on sm_90a for mxfp4_mxfp8: a native tile has m divisible by 64, not 8",
        ),
        (HEAD + row(m=64, swap_ab="true"), r"a swapped tile has m in 8, 16, 32, not 64"),
        (HEAD + row(m=8, n=32, swap_ab="true"), r"a swapped tile has n of at least 64, not 32"),
        (HEAD + row(n=512), r"n must be from 8 to 256 .*, not 512"),
        (HEAD + row(m=512), r"m must be at most 256 .*, not 512"),
        (HEAD + row(n=12), r"n must be divisible by 8, the MMA's granule, not 12"),
        (HEAD + row(n=48), r"n must divide 64, the rows of a weight block, or be a multiple: 48"),
        (
            HEAD + row(n=192),
            r"8 MMA warps as a 1 x 6 grid of 128 x 32 warp tiles do not cover 128 x 192 in whole 16 x 8",
        ),
        (HEAD + row(m=-64, n=0), r"m divisible by 64, not -64"),
    ],
)
def test_a_manifest_that_cannot_work_is_refused(text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=f"^tile_manifest.toml: .*{message}") as error:
        tiles.parse_manifest(text)
    assert "\n" not in str(error.value) or "TOML" in message


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nothing\.toml: cannot be read .*: reinstall mxfp4-moe"):
        tiles.load_manifest(tmp_path / "nothing.toml")
