"""The self-test on the GPU that is here, and a blocklist that fused_moe respects there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import gpu_problems
import pytest
import torch
from gpu_problems import bits, random_call, random_weights

import mxfp4_moe
from mxfp4_moe import cli
from mxfp4_moe._call.launch import layer_operator
from mxfp4_moe._call.selection import select
from mxfp4_moe._install import blocklist, wheel
from mxfp4_moe.tiles import load_manifest, nearest_tile

TILES = load_manifest().tiles


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, and nothing decided from another one."""
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", str(tmp_path))
    for cached in (layer_operator, blocklist.blocked):
        cached.cache_clear()
    yield tmp_path
    for cached in (layer_operator, blocklist.blocked):
        cached.cache_clear()


def test_every_tile_passes_and_nothing_is_blocked(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = gpu_problems.gpu()
    status = cli.main(["doctor", "--selftest", "--json", "--device", str(device.index)])
    out, err = capsys.readouterr()
    data = json.loads(out)
    report = data["selftest"]
    assert report["passed"], json.dumps(report, indent=1)
    assert [tile["name"] for tile in report["tiles"]] == [tile.name for tile in wheel.built_tiles()]
    for tile in report["tiles"]:
        assert tile["answers"] == {"layout": "", "accuracy": "", "agreement": ""}, tile["name"]
        assert tile["arithmetic"]["differ"] == 0, tile["name"]
        pairs, left = divmod(tile["arithmetic"]["values"], 662 * (16 + 80 + 144 + 272 + 512))
        assert pairs >= 1, "those of formats that the tile has kernels for"
        assert left == 0
        assert tile["checks"] >= 57 * pairs
    assert report["arithmetic"] == ""
    given = [tile["digests"] for tile in report["tiles"]]
    for what in {what for digests in given for what in digests}:  # not every tile is built for every pair of formats
        assert len({digests[what] for digests in given if what in digests}) == 1, (
            f"{what}: the same bits from every tile"
        )
    assert report["device"]["name"] == torch.cuda.get_device_name(device)
    assert report["device"]["arch"] == wheel.arch_for(torch.cuda.get_device_capability(device))
    assert (status, data["worst"]) == (0, "ok"), data["findings"]
    assert not list((cache / "blocklist").rglob("*.json"))
    progress = [line for line in err.splitlines() if line.startswith("tile ")]
    assert len(progress) == len(report["tiles"])

    status = cli.main(["doctor", "--verify", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["level"] for finding in findings} == {"ok"}, findings
    assert status == 0
    count = len(report["tiles"])
    texts = [finding["text"] for finding in findings]
    assert any(text.startswith(f"{count} of {count} tiles passed on {report['device']['name']}") for text in texts)
    assert f"{count + 1} of {count + 1} libraries load" in texts


def test_a_blocked_tile_gives_way_with_one_warning_and_the_same_bits() -> None:
    device = gpu_problems.gpu()
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    weights = random_weights(8, 160, 96, device)
    call = random_call(33, 3, weights)
    expected = {tile: mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=tile.mn) for tile in TILES}
    chosen = select(33, 3, 8, 160, 96, device.index)
    for blocked in dict.fromkeys((TILES[0], TILES[-1], chosen)):
        left = [tile for tile in TILES if tile != blocked]
        blocklist.write(name, capability, {blocked: "planted by a test"})
        layer_operator.cache_clear()
        blocklist.blocked.cache_clear()
        words = (
            rf"tile {blocked.name} is not used on {name}: .*\(planted by a test\); {nearest_tile(blocked, left).name} "
        )
        with pytest.warns(RuntimeWarning, match=words) as caught:
            out = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=blocked.mn)
        assert len(caught) == 1
        assert torch.equal(bits(out), bits(expected[blocked]))
        assert layer_operator(device.index, blocked)[1] == nearest_tile(blocked, left)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=blocked.mn)
            automatic = mxfp4_moe.fused_moe(*call.args(), weights)
        assert torch.equal(bits(again), bits(out))
        assert torch.equal(bits(automatic), bits(expected[chosen]))
