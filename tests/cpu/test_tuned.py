"""Tuned tables: what is read, what is refused, and which tile a call gets; and the cost model where there is none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_cases import H200, LARGE, LAYER, MIDDLE, RTX_5090, SMALL, TILES

from mxfp4_moe._call import selection
from mxfp4_moe._choice import choice, cost_model, sm90_model, tuned
from mxfp4_moe._choice.facts import DeviceFacts, Layer
from mxfp4_moe._choice.tuned import Choice, Entry, TunedError, TunedLayer
from mxfp4_moe._install import blocklist, loading, wheel
from mxfp4_moe.bench import shapes, statistics, tune
from mxfp4_moe.cli import tune as tune_cli
from mxfp4_moe.tiles import Tile, select_tile

SHIPPED = tuned.SHIPPED  # the package's, before `places` puts an empty folder in its place


def tuned_layer(layer: Layer = LAYER, **tiles: Tile) -> TunedLayer:
    """Entries by keyword: t16=tile."""
    return TunedLayer(
        layer,
        [Entry(tokens=int(t[1:]), choice=Choice(gemm1=tile, gemm2=tile), us=10.0) for t, tile in tiles.items()],
    )


def table_data(device: DeviceFacts = H200) -> Any:
    return tuned.as_dict(device, [tuned_layer(t1=SMALL, t16=MIDDLE, t1024=LARGE)], "2026-01-01")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory and a folder of shipped tables, both empty; nothing is remembered from other tests."""
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.tables.cache_clear()
    return tmp_path


def user_table(data: Any, device: DeviceFacts = H200) -> Path:
    path = tuned.user_path(device)
    assert path is not None
    tuned.write(path, data)
    return path


def test_between_two_entries_the_nearer_counts() -> None:
    table = tuned.Table([tuned_layer(t1=SMALL, t16=MIDDLE, t1024=LARGE)])
    for tokens, tile in (
        (1, SMALL),
        (2, SMALL),
        (15, MIDDLE),
        (16, MIDDLE),
        (64, MIDDLE),
        (1024, LARGE),
        (10**6, LARGE),
    ):
        found = table.look_up(LAYER, tokens)
        assert found is not None
        assert found.gemm1 == tile, tokens


def test_a_layer_of_the_same_sizes_serves_by_rows_per_expert() -> None:
    other = dataclasses.replace(LAYER, experts=32)
    table = tuned.Table([tuned_layer(t1=SMALL, t64=MIDDLE, t1024=LARGE)])
    found = [table.look_up(other, tokens) for tokens in (1, 256)]
    assert [choice and choice.gemm1 for choice in found] == [SMALL, LARGE], "256 tokens here are 1024 there"
    both = tuned.Table([*table.layers, tuned_layer(other, t1=LARGE)])
    nearest = both.look_up(other, 1)
    assert nearest is not None
    assert nearest.gemm1 == LARGE, "its own entries before another's"
    assert both.look_up(dataclasses.replace(LAYER, hidden=4096), 1) is None
    assert both.look_up(LAYER, 0) is None


def test_the_users_table_goes_before_the_shipped_one(places: Path) -> None:
    shipped = [tuned_layer(t1=LARGE), tuned_layer(dataclasses.replace(LAYER, hidden=4096), t1=LARGE)]
    tuned.write(places / "shipped" / tuned.file_name(H200), tuned.as_dict(H200, shipped, "2026-01-01"))
    user_table(table_data())
    assert choice.choose_tile(1, LAYER, H200, TILES) == SMALL
    assert choice.choose_tile(1, dataclasses.replace(LAYER, hidden=4096), H200, TILES) == LARGE
    narrow, other = dataclasses.replace(LAYER, hidden=64), dataclasses.replace(H200, sms=114)
    assert tuned.look_up(H200, narrow, 1) is None
    assert choice.choose_tile(1, narrow, H200, TILES) == sm90_model.choose(1, narrow, H200, TILES)
    assert tuned.look_up(other, LAYER, 1) is None, "a part of the GPU is another device"
    assert choice.choose_tile(1, LAYER, other, TILES) == sm90_model.choose(1, LAYER, other, TILES)


def test_files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    user_table(table_data())
    assert tuned.look_up(H200, LAYER, 1) is not None

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a second look-up reads a file")

    monkeypatch.setattr(tuned, "read", never)
    monkeypatch.setattr(Path, "read_bytes", never)
    assert all(tuned.look_up(H200, LAYER, tokens) is not None for tokens in range(1, 100))


def test_a_tile_that_is_not_among_the_choices_is_not_taken() -> None:
    user_table(table_data())
    left = [tile for tile in TILES if tile != SMALL]
    assert choice.choose_tile(1, LAYER, H200, left) == sm90_model.choose(1, LAYER, H200, left)


def test_a_call_on_a_gpu_takes_the_tables_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "device_facts", lambda index: H200)
    user_table(table_data())
    rule = select_tile(1, 4, 128, TILES)
    assert rule != SMALL
    selection.select.cache_clear()
    assert selection.select(1, 4, 128, 2880, 2880, 0) == SMALL
    other = dataclasses.replace(LAYER, hidden=4096)
    assert selection.select(16, 4, 128, 4096, 2880, 0) == sm90_model.choose(16, other, H200, TILES) != MIDDLE
    assert selection.select(1, 4, 128, 2880, 2880, None) == rule, "no GPU"
    assert selection.select(0, 4, 128, 2880, 2880, 0) == select_tile(0, 4, 128, TILES)
    selection.select.cache_clear()


def changed(**changes: Any) -> Any:
    return table_data() | changes


def with_entry(**changes: Any) -> Any:
    data = table_data()
    data["layers"][0]["entries"][1] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(schema=2), "schema: expected 1, got 2"),
        (changed(layers=[{}]), "damaged (KeyError: 'experts')"),
        (changed(layers=[table_data()["layers"][0] | {"experts": 0}]), "layer 0: experts: expected a positive integer"),
        (changed(layers=[table_data()["layers"][0] | {"top_k": 129}]), "layer 0: top_k 129 of 128 experts"),
        (changed(layers=[table_data()["layers"][0] | {"entries": []}]), "layer 0: no entries"),
        (changed(layers=table_data()["layers"] * 2), "layer 1: the same layer as before"),
        (with_entry(gemm1="m1n1"), "layer 0, entry 1: gemm1 'm1n1' is no tile of this wheel's manifest"),
        (with_entry(gemm2="m128n128"), "one tile for both GEMMs, got m64n128 and m128n128"),
        (with_entry(us=-1), "layer 0, entry 1: us is a positive number, got -1"),
        (with_entry(us=float("nan")), "us is a positive number, got nan"),
        (with_entry(tokens="16"), "entry 1: tokens: expected a positive integer, got '16'"),
        (with_entry(tokens=1), "layer 0: the same number of tokens twice"),
        (changed(wheel="9.9"), "is for another wheel (9.9, here "),
        (changed(device="NVIDIA H100"), "is for another device"),
        (changed(sms=131), "is for another device"),
        ([1], "damaged (TypeError"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_warning_and_the_model(data: Any, words: str) -> None:
    path = user_table(data)
    with pytest.warns(RuntimeWarning) as caught:
        tile = choice.choose_tile(16, LAYER, H200, TILES)
    assert tile == sm90_model.choose(16, LAYER, H200, TILES) != MIDDLE
    (said,) = [str(warning.message) for warning in caught]
    assert words in said
    assert str(path) in said
    assert said.endswith("is ignored: run `mxfp4-moe tune` to measure a new one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.choose_tile(2, LAYER, H200, TILES)


def test_a_file_that_is_no_json(places: Path) -> None:
    path = user_table({})
    path.write_text('{"schema": 1, ')
    with pytest.raises(TunedError, match="damaged"):
        tuned.read(path, H200, same_wheel=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(TunedError, match="cannot be read"):
        tuned.read(path, H200, same_wheel=True)
    assert tuned.read(places / "none.json", H200, same_wheel=True) is None


def test_a_shipped_table_need_not_be_of_this_version(places: Path) -> None:
    tuned.write(places / "shipped" / tuned.file_name(H200), changed(wheel="0.0.1"))
    assert choice.choose_tile(1, LAYER, H200, TILES) == SMALL


def test_what_is_written_is_what_is_read() -> None:
    path = user_table(table_data())
    table = tuned.read(path, H200, same_wheel=True)
    assert table is not None
    assert tuned.as_dict(H200, table.layers, "2026-01-01") == table_data()
    assert table_data()["wheel"] == wheel.version()
    assert [file.name for file in path.parent.iterdir()] == ["nvidia-h200-sm90-132.json"], "no temporary is left"


def test_the_tables_in_the_package_are_valid() -> None:
    paths = list(SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text())
        device = dataclasses.replace(H200, name=data["device"], capability=tuple(data["capability"]), sms=data["sms"])
        assert tuned.file_name(device) == path.name
        assert tuned.read(path, device, same_wheel=False) is not None


def test_the_choice_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in (1, 100, 5000):
        rounded = tokens if tokens < 32 else choice._rounded(tokens)
        assert choice.choose_tile(tokens, LAYER, H200, TILES) == sm90_model.choose(rounded, LAYER, H200, TILES)
        known = choice.loop_instructions("120f")
        expected = cost_model.choose(rounded, LAYER, RTX_5090, TILES, known)
        assert choice.choose_tile(tokens, LAYER, RTX_5090, TILES) == expected
        unknown = dataclasses.replace(H200, capability=(10, 0))
        assert choice.choose_tile(tokens, LAYER, unknown, TILES) == select_tile(tokens, 4, 128, TILES)
    assert [choice._rounded(tokens) for tokens in (1, 31, 32, 33, 1000, 1023)] == [1, 31, 32, 32, 992, 992]


def test_the_fastest_is_picked_and_the_rule_where_it_is_as_good() -> None:
    us = {SMALL: 100.0, MIDDLE: 90.0, LARGE: 90.3}
    assert tune.pick(us, rule=SMALL) == MIDDLE
    assert tune.pick(us, rule=LARGE) == LARGE
    assert tune.pick(us, rule=Tile.from_mn((256, 64))) == MIDDLE


def test_the_table_of_a_run() -> None:
    us = {SMALL: 100.0, MIDDLE: 90.0, LARGE: 180.0}
    measured = [tune.Measured(tokens=16, us=us, chosen=MIDDLE, rule=SMALL, model=LARGE)]
    assert tune.table(measured).splitlines()[1].split() == (
        "16 m64n128 90.0 m8n64_swap +11.1% m128n128 +100.0%".split()
    )
    layer = tune.tuned_layer(LAYER, measured)
    again = tune.merged([tuned_layer(t1=LARGE), tuned_layer(dataclasses.replace(LAYER, experts=8), t1=LARGE)], layer)
    assert [(tuned.layer.experts, tuned.entries[0].tokens) for tuned in again] == [(8, 1), (128, 16)]


def test_a_run_measures_every_tile_and_the_best_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that knows each tile's time, and gives the first, short measurement of one tile wrong."""
    asked: list[tuple[Tile, int]] = []
    truth = {tile: 100.0 + place for place, tile in enumerate(TILES)}

    class Clock:
        def __init__(self, device: torch.device) -> None:
            pass

        def measure(self, calls: list[Tile], replays: int) -> statistics.Summary:
            assert len(calls) == 4
            assert len(set(calls)) == 1
            tile = calls[0]
            asked.append((tile, replays))
            return statistics.summarize([50.0 if tile == TILES[2] and replays == 8 else truth[tile]])

    monkeypatch.setattr(tune, "Timer", Clock)
    monkeypatch.setattr(tune, "usable_tiles", lambda facts, progress: list(TILES))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    by_mn = {tile.mn: tile for tile in TILES}
    monkeypatch.setattr(tune, "our_call", lambda weights, top_k, mn, include_routing: lambda call: by_mn[mn])
    shape = shapes.MoEShape(name="", experts=4, top_k=2, hidden=64, intermediate=32)
    told: list[str] = []
    (measured,) = tune.run(shape, [5], H200, torch.device("cpu"), 40, told.append)
    assert [tile for tile, replays in asked if replays == 8] == list(TILES)
    again = {tile for tile, replays in asked if replays == 40}
    assert {TILES[0], TILES[1], TILES[2], TILES[3], measured.rule, measured.model} == again
    assert measured.chosen == TILES[0], "TILES[2] was fastest in the short round alone"
    assert measured.rule == select_tile(5, 2, 4, TILES)
    assert told[-1] == f"5 tokens: {TILES[0].name} 100.0 us, of 26 tiles"


def test_tiles_that_cannot_be_used_are_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(tile: Tile) -> None:
        if tile == TILES[1]:
            raise loading.LoadError("it is truncated")

    monkeypatch.setattr(loading, "load_tile", load)
    monkeypatch.setattr(blocklist, "blocked", lambda device, capability: {TILES[0].name: "wrong bits"})
    told: list[str] = []
    assert tune.usable_tiles(H200, told.append) == list(TILES[2:])
    assert told == [
        f"{TILES[0].name}: left out, it failed the self-test on this GPU",
        f"{TILES[1].name}: left out, it is truncated",
    ]
    monkeypatch.setattr(blocklist, "blocked", lambda device, capability: {tile.name: "" for tile in TILES})
    with pytest.raises(RuntimeError, match="no tile of this wheel can be used here"):
        tune.usable_tiles(H200, told.append)


def test_where_the_table_goes(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tuned.file_name(H200)
    assert tune_cli.output_path(None, H200) == places / "cache" / "tuned" / name
    assert tune_cli.output_path(places, H200) == places / name
    assert tune_cli.output_path(places / "x.json", H200) == places / "x.json"
    monkeypatch.setattr(tuned, "cache_dir", lambda: None)
    with pytest.raises(ValueError, match="set MXFP4_MOE_CACHE_DIR, or name a file with --output"):
        tune_cli.output_path(None, H200)
    path = places / "x.json"
    assert tune_cli.layers_before(path, H200) == []
    tuned.write(path, table_data())
    assert [tuned.layer for tuned in tune_cli.layers_before(path, H200)] == [LAYER]
    tuned.write(path, changed(wheel="9.9"))
    assert tune_cli.layers_before(path, H200) == []
    assert "another wheel" in capsys.readouterr().err
