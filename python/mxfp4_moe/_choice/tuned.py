"""Tuned tables: which tile was fastest on a GPU, by layer and number of tokens. Standard library alone.

`mxfp4-moe tune` writes one JSON file for each device (name, compute capability and number of SMs) into the user's cache
directory; files of the same form, in tuned/, ship in the wheel. The user's goes first, layer by layer. Files are
read once per device and process; from then on a look-up is a dictionary and a bisection. A file that is damaged, or of
another device or wheel, is left out with one warning, and the tile is chosen as if it were not there.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .._install import wheel as _wheel
from .._install.cache import cache_dir, write_json
from ..tiles import Tile, expected_rows_per_expert, load_manifest
from .facts import DeviceFacts, Layer

SCHEMA = 1
REMEDY = "run `mxfp4-moe tune` to measure a new one"
SHIPPED = Path(__file__).resolve().parents[1] / "tuned"


class TunedError(ValueError):
    """A tuned table that is there but cannot be used; the message says which file, why, and what to run."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The tiles of the two GEMMs. The runtime has one tile for both, and so do tables that it reads."""

    gemm1: Tile
    gemm2: Tile


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The fastest tiles at one number of tokens, and the time of the whole call with them."""

    tokens: int
    choice: Choice
    us: float


class TunedLayer:
    """The entries of one layer. Between two numbers of tokens the nearer one counts, by the ratio of rows."""

    def __init__(self, layer: Layer, entries: Sequence[Entry]) -> None:
        self.layer, self.entries = layer, sorted(entries, key=lambda entry: entry.tokens)
        rows = [expected_rows_per_expert(entry.tokens, layer.top_k, layer.experts) for entry in self.entries]
        self._borders = [math.sqrt(a * b) for a, b in pairwise(rows)]

    def choice(self, rows: float) -> Choice:
        """The tiles for this many expected rows of an active expert."""
        return self.entries[bisect_right(self._borders, rows)].choice


class Table:
    """One device's tuned layers."""

    def __init__(self, layers: Sequence[TunedLayer]) -> None:
        self.layers = tuple(layers)
        self._by_sizes: dict[tuple[int, int], list[TunedLayer]] = {}
        for tuned in layers:
            self._by_sizes.setdefault((tuned.layer.hidden, tuned.layer.intermediate), []).append(tuned)

    def look_up(self, layer: Layer, tokens: int) -> Choice | None:
        """The tiles for a call; None for sizes that were not tuned.

        The tiles of a layer with the same hidden and intermediate size serve for other numbers of experts too: what
        counts is how many rows an expert gets. Of several, the one with the nearest number of experts.
        """
        alike = self._by_sizes.get((layer.hidden, layer.intermediate))
        if not alike or tokens < 1:
            return None
        nearest = min(alike, key=lambda tuned: (_ratio(tuned.layer.experts, layer.experts), tuned.layer.top_k))
        return nearest.choice(expected_rows_per_expert(tokens, layer.top_k, layer.experts))


def _ratio(a: int, b: int) -> float:
    return abs(math.log(a / b))


def file_name(device: DeviceFacts) -> str:
    """Such as nvidia-h200-sm90-132.json: the same name never stands for two kinds of GPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return f"{slug}-sm{device.capability[0]}{device.capability[1]}-{device.sms}.json"


def user_path(device: DeviceFacts) -> Path | None:
    """Where `mxfp4-moe tune` writes the device's table; None for a user without a home."""
    folder = cache_dir()
    return None if folder is None else folder / "tuned" / file_name(device)


# ---- reading ---------------------------------------------------------------------------------------------------------


@functools.cache
def tables(device: DeviceFacts) -> tuple[Table, ...]:
    """The device's tables that can be used, the user's first; read once per process."""
    found = []
    for path, mine in ((user_path(device), True), (SHIPPED / file_name(device), False)):
        try:
            table = None if path is None else read(path, device, same_wheel=mine)
        except TunedError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            continue
        if table is not None:
            found.append(table)
    return tuple(found)


def look_up(device: DeviceFacts, layer: Layer, tokens: int) -> Choice | None:
    """The tuned tiles for a call, None where no table has its sizes."""
    for table in tables(device):
        if choice := table.look_up(layer, tokens):
            return choice
    return None


def read(path: Path, device: DeviceFacts, *, same_wheel: bool) -> Table | None:
    """The table in a file, None where there is none.

    Args:
        same_wheel: refuse a table of another version of the wheel, whose kernels may have other speeds.

    Raises:
        TunedError: it cannot be read, is not a table, or is another device's or wheel's.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TunedError(f"tuned table {path} cannot be read ({error.strerror}) and is ignored: {REMEDY}") from error
    try:
        data = json.loads(text)
        layers = parse(data)
        measured_on = (str(data["device"]), tuple(data["capability"]), data["sms"])
        wheel = str(data["wheel"])
    except TunedError as error:
        raise TunedError(f"tuned table {path} is not valid ({error}) and is ignored: {REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}"
        raise TunedError(f"tuned table {path} is damaged ({words}) and is ignored: {REMEDY}") from error
    here = (device.name, device.capability, device.sms)
    if measured_on != here:
        raise TunedError(
            f"tuned table {path} is for another device ({measured_on}, here {here}) and is ignored: {REMEDY}"
        )
    if same_wheel and wheel != _wheel.version():
        raise TunedError(
            f"tuned table {path} is for another wheel ({wheel}, here {_wheel.version()}) and is ignored: {REMEDY}"
        )
    return Table(layers)


def parse(data: Any) -> list[TunedLayer]:
    """The layers of a table.

    Raises:
        TunedError: values that make no sense; the message says which.
        KeyError, TypeError, AttributeError: fields that are missing or of another type.
    """
    if data["schema"] != SCHEMA:
        raise TunedError(f"schema: expected {SCHEMA}, got {data['schema']!r}")
    tiles = {tile.name: tile for tile in load_manifest().tiles}
    layers: list[TunedLayer] = []
    for place, item in enumerate(data["layers"]):
        where = f"layer {place}"
        layer = Layer(**{name: _count(item[name], f"{where}: {name}") for name in Layer.__dataclass_fields__})
        if layer.top_k > layer.experts:
            raise TunedError(f"{where}: top_k {layer.top_k} of {layer.experts} experts")
        if layer in [tuned.layer for tuned in layers]:
            raise TunedError(f"{where}: the same layer as before")
        entries = [_entry(entry, tiles, f"{where}, entry {at}") for at, entry in enumerate(item["entries"])]
        if not entries:
            raise TunedError(f"{where}: no entries")
        if len({entry.tokens for entry in entries}) != len(entries):
            raise TunedError(f"{where}: the same number of tokens twice")
        layers.append(TunedLayer(layer, entries))
    return layers


def _entry(item: Mapping[str, Any], tiles: Mapping[str, Tile], where: str) -> Entry:
    for gemm in ("gemm1", "gemm2"):
        if item[gemm] not in tiles:
            raise TunedError(f"{where}: {gemm} {item[gemm]!r} is no tile of this wheel's manifest")
    if item["gemm1"] != item["gemm2"]:
        raise TunedError(f"{where}: this version has one tile for both GEMMs, got {item['gemm1']} and {item['gemm2']}")
    us = item["us"]
    if isinstance(us, bool) or not isinstance(us, (int, float)) or not 0 < us < math.inf:
        raise TunedError(f"{where}: us is a positive number, got {us!r}")
    choice = Choice(gemm1=tiles[item["gemm1"]], gemm2=tiles[item["gemm2"]])
    return Entry(tokens=_count(item["tokens"], f"{where}: tokens"), choice=choice, us=us)


def _count(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TunedError(f"{where}: expected a positive integer, got {value!r}")
    return value


# ---- writing ---------------------------------------------------------------------------------------------------------


def as_dict(device: DeviceFacts, layers: Sequence[TunedLayer], date: str) -> dict[str, Any]:
    """The table as JSON has it."""
    return {
        "schema": SCHEMA,
        "device": device.name,
        "capability": list(device.capability),
        "sms": device.sms,
        "wheel": _wheel.version(),
        "date": date,
        "layers": [
            {
                **vars(tuned.layer),
                "entries": [
                    {
                        "tokens": entry.tokens,
                        "gemm1": entry.choice.gemm1.name,
                        "gemm2": entry.choice.gemm2.name,
                        "us": entry.us,
                    }
                    for entry in tuned.entries
                ],
            }
            for tuned in layers
        ],
    }


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Puts a table in place of the one before, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    write_json(path, data)
