"""A checkpoint's files as one set of tensors: where each is, and its bytes.

Headers are read when a tensor in the file is asked for, so that a layer costs the files that hold it and nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .headers import Entry, read_header
from .refusals import HEAD_BYTES, missing, other_formats, what_is

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.*?)-+(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class Checkpoint:
    """The tensors of a file, or of a directory's files with or without an index.

    Args:
        path: a .safetensors file; a directory with model.safetensors, with model.safetensors.index.json and the shards
            that it names, or with other .safetensors files; or an index.

    Raises:
        FileNotFoundError: nothing is there, or nothing that can be read; says what is there, and what to do.
        ValueError: a malformed index, or a set of shards of which one is missing.
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path: expected a str or a path, got {path!r}")
        if isinstance(path, str) and not path:  # of a variable that is not set; it would be the current directory
            raise ValueError("path: expected a file or directory, got ''; '.' is the current directory")
        self.path = Path(path)
        self.bytes_read = 0  # of tensors
        self._headers: dict[Path, dict[str, Entry]] = {}
        self._streams: dict[Path, BinaryIO] = {}
        self._files, self._index = _find(self.path)
        self._shards: dict[str, Any] = {} if self._index is None else _weight_map(self._index)
        self._where: dict[str, Path] | None = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    @property
    def folder(self) -> Path:
        """Where config.json would be."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def listing(self) -> Path:
        """The file that says which tensors there are: an index, the one file, or the directory."""
        return self._index or (self._files[0] if len(self._files) == 1 else self.path)

    def names(self) -> Iterator[str]:
        """The names of all tensors; an index gives them without any other file being opened."""
        return iter(self._shards if self._index is not None else self._places())

    def __contains__(self, name: str) -> bool:
        return name in (self._shards if self._index is not None else self._places())

    def entry(self, name: str) -> Entry:
        """Where a tensor is.

        Raises:
            ValueError: there is no such tensor, or its file is missing or malformed (names the tensor and the file).
        """
        file = self._file_of(name)
        try:
            found = self._header(file).get(name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if found is None:
            raise ValueError(f"{name}: no such tensor in {file}")
        return found

    def read(self, entries: Sequence[Entry], device: torch.device | str, part: int | None = None) -> Tensor:
        """Tensors of one dtype, one behind the other along their first dimension; bytes are read, nothing is mapped.

        Args:
            part: of each only this index of the first dimension.
        """
        import torch

        first = entries[0]
        shapes = [entry.shape if part is None else entry.shape[1:] for entry in entries]
        sizes = [entry.nbytes if part is None else entry.nbytes // entry.shape[0] for entry in entries]
        buffer, at = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu"), 0
        for entry, size in zip(entries, sizes, strict=True):
            self._read_into(entry, (part or 0) * size, buffer[at : at + size])
            at += size
        rows = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        return buffer.to(device).view(torch_dtype(first)).view(rows)  # bytes move everywhere, not every dtype does

    def _read_into(self, entry: Entry, skip: int, buffer: Tensor) -> None:
        size = buffer.numel()
        if size == 0:
            return
        if entry.file not in self._streams:
            self._streams[entry.file] = entry.file.open("rb", buffering=0)
        stream, done = self._streams[entry.file], 0
        stream.seek(entry.begin + skip)
        target = memoryview((ctypes.c_ubyte * size).from_address(buffer.data_ptr())).cast("B")
        while done < size:  # one read gives at most 2 GiB
            count = stream.readinto(target[done:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError(
                    f"{entry.name}: cannot be read from {entry.file}: the file ended {size - done} bytes early"
                )
            done += count
        self.bytes_read += size

    def _header(self, file: Path) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = read_header(file)
        return self._headers[file]

    def _places(self) -> dict[str, Path]:
        if self._where is None:
            self._where = {}
            for file in self._files:
                for name in self._header(file):
                    if name in self._where:
                        raise ValueError(
                            f"{name}: expected one tensor of this name, got one in {self._where[name]} and in {file}"
                        )
                    self._where[name] = file
        return self._where

    def _file_of(self, name: str) -> Path:
        if self._index is None:
            places = self._places()
            if name not in places:
                raise ValueError(f"{name}: no such tensor in {self.listing}")
            return places[name]
        if name not in self._shards:
            raise ValueError(f"{name}: no such tensor in {self._index}")
        shard = self._shards[name]
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{name}: expected the name of a file beside {self._index}, got {shard!r}")
        file = self._index.parent / shard
        if not file.is_file():
            why = missing(file)
            raise ValueError(
                f"{name}: {self._index} says {shard}, and there is no such file{f'; {why}' if why else ''}"
            )
        return file


def torch_dtype(entry: Entry) -> torch.dtype:
    """The dtype in which torch shows a tensor.

    Raises:
        ValueError: this torch has no such dtype.
    """
    import torch

    names = {"U8": "uint8", "I8": "int8", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    names |= {"F4": "float4_e2m1fn_x2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn", "I32": "int32"}
    found = getattr(torch, names.get(entry.dtype, ""), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"{entry.name}: cannot be read from {entry.file}: torch {torch.__version__} has no {entry.dtype}"
        )
    return found


def _find(path: Path) -> tuple[list[Path], Path | None]:
    """The files to look in, or the index that names them."""
    if path.is_file():
        return ([], path) if path.name.endswith(".safetensors.index.json") else ([path], None)
    if not path.is_dir():
        raise FileNotFoundError(missing(path) or f"path: expected a file or directory, got {path}")
    if (path / _SINGLE).is_file():
        return [path / _SINGLE], None
    if (path / _INDEX).is_file():
        return [], path / _INDEX
    files = sorted(file for file in path.glob("*.safetensors"))
    if not files:
        links = [link for link in (path / _SINGLE, path / _INDEX) if link.is_symlink()]
        why = missing(links[0]) if links else other_formats(path)
        raise FileNotFoundError(
            f"path: expected {_SINGLE} or {_INDEX} in the directory, got {path}{f'; {why}' if why else ''}"
        )
    _check_complete(path, files)
    return files, None


def _check_complete(path: Path, files: Sequence[Path]) -> None:
    """Without an index the shards' own names say how many there are."""
    for match in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        have = {m["number"] for m in (_SHARD.fullmatch(f.name) for f in files) if m and m["count"] == match["count"]}
        lacking = [f"{n:05}" for n in range(1, int(match["count"]) + 1) if f"{n:05}" not in have]
        if lacking and "00000" not in have:
            raise ValueError(
                f"{path}: expected the {int(match['count'])} files of {match['stem']}, got {len(have)}: "
                f"number {', '.join(lacking[:5])} is missing; download it"
            )


def _weight_map(index: Path) -> dict[str, Any]:
    text = index.read_bytes()
    try:
        shards = json.loads(text)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        kind = what_is(text[:HEAD_BYTES])
        got = f"{kind[0]}; {kind[1]}" if kind and kind[0] != "JSON text" else repr(error)
        raise ValueError(f'{index}: expected JSON with a "weight_map" object, got {got}') from error
    if not isinstance(shards, dict):
        raise ValueError(f'{index}: expected "weight_map" to be an object, got {type(shards).__name__}')
    return shards
