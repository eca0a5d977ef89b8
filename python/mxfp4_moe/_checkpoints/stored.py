"""Reading tensors of a safetensors checkpoint, whole or one expert at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StoredTensor:
    """A tensor in a file, read whole or one expert at a time."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        shape = stored.get_shape()
        dtype = stored[:0].dtype if shape else stored[...].dtype
        self.spec = torch.empty(shape, dtype=dtype, device="meta")

    def whole(self) -> Tensor:
        tensor: Tensor = self._stored[:]
        return tensor

    def expert(self, e: int) -> Tensor:
        tensor: Tensor = self._stored[e : e + 1]
        return tensor[0]


class TensorFiles(ExitStack):
    """The files of a checkpoint, opened when a tensor in them is asked for and closed together."""

    def __init__(self, path: Path, device: torch.device | str) -> None:
        super().__init__()
        self._find = _tensor_files(path)
        self._device = str(device)
        self._readers: dict[Path, Any] = {}

    def open(self, name: str) -> StoredTensor:
        from safetensors import SafetensorError, safe_open

        file = self._find(name)
        try:
            if file not in self._readers:
                self._readers[file] = self.enter_context(safe_open(file, framework="pt", device=self._device))
            names = self._readers[file].keys()
            if name not in names:
                raise ValueError(f"{name}: no such tensor in {file}")
            return StoredTensor(self._readers[file].get_slice(name))
        except SafetensorError as error:
            raise ValueError(f"{name}: cannot be read from {file}: {error}") from error


def _tensor_files(path: Path) -> Callable[[str], Path]:
    """The function from a tensor's name to the file that holds it."""
    if path.is_file():
        return lambda name: path
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return lambda name: single
    if not index.is_file():
        what = f"{single.name} or {index.name} in the directory" if path.is_dir() else "a file or directory"
        raise FileNotFoundError(f"path: expected {what}, got {path}")
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{index}: expected JSON with a "weight_map" object, got {error!r}') from error
    if not isinstance(shards, dict):
        raise ValueError(f'{index}: expected "weight_map" to be an object, got {type(shards).__name__}')

    def find(name: str) -> Path:
        if name not in shards:
            raise ValueError(f"{name}: no such tensor in {index}")
        shard = shards[name]
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{name}: expected the name of a file beside {index}, got {shard!r}")
        if not (path / shard).is_file():
            raise ValueError(f"{name}: {index} says {shard}, and there is no such file")
        return path / shard

    return find
