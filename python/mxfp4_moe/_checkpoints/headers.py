"""Headers of safetensors files, read without the library's help, so that what is wrong with a file can be said.

A file is a length (u64, little-endian), that many bytes of JSON, and the tensors' bytes end to end
(https://github.com/huggingface/safetensors, README). Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .refusals import HEAD_BYTES, missing, what_is

_MAX_HEADER = 100_000_000  # safetensors' own limit
_LENGTH_BYTES = 8

# Bits of an element: dtypes of safetensors 0.8.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {
    name: 8 * size
    for size, names in {
        1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
        2: ("U16", "I16", "F16", "BF16"),
        4: ("U32", "I32", "F32"),
        8: ("U64", "I64", "F64", "C64"),
    }.items()
    for name in names
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors writes it: "U8", "BF16", "F8_E8M0", ...
        shape: as torch sees the tensor: of F4 the last dimension counts bytes.
        begin: where its bytes start in the file.
        nbytes: how many they are.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name.

    Raises:
        FileNotFoundError: no such file; says of a dangling link that it is one.
        ValueError: not a safetensors file, or not all of one; says what it is and what to do.
    """
    if not file.exists():
        raise FileNotFoundError(missing(file) or f"path: expected a file or directory, got {file}")
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"{file}: cannot be read: the file is empty; download it again")
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        begins_as_one = len(head) > _LENGTH_BYTES and head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
        if not begins_as_one or not 2 <= length <= _MAX_HEADER:
            kind = what_is(head)
            what, remedy = kind or ("no safetensors file, and nothing else that is known", "download it again")
            raise ValueError(f"{file}: cannot be read: it is {what}; {remedy}")
        data_begin = _LENGTH_BYTES + length
        if data_begin > size:
            raise ValueError(_truncated(file, data_begin, size, "its header alone takes"))
        stream.seek(_LENGTH_BYTES)
        try:
            raw = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: cannot be read: its header is not JSON ({error}); download it again") from error
    return _entries(file, raw, data_begin, size)


def _entries(file: Path, raw: Any, data_begin: int, size: int) -> dict[str, Entry]:
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: cannot be read: expected a header that is an object, got {type(raw).__name__}")
    entries, end = {}, data_begin
    for name, stored in raw.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = str(stored["dtype"]), tuple(map(int, stored["shape"])), stored["data_offsets"]
            nbytes = int(last) - int(first)
            bits = _BITS.get(dtype)
            fits = first >= 0 and all(n >= 0 for n in shape) and bits in (None, 8 * nbytes / max(1, math.prod(shape)))
            if not fits and not (bits is not None and math.prod(shape) == 0 and nbytes == 0):
                raise ValueError(f"{nbytes} bytes for {dtype} {list(shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: cannot be read from {file}: malformed entry in the header ({error})") from error
        if dtype == "F4" and shape:
            shape = (*shape[:-1], shape[-1] // 2)
        entries[name] = Entry(name=name, file=file, dtype=dtype, shape=shape, begin=data_begin + first, nbytes=nbytes)
        end = max(end, data_begin + last)
    if end > size:
        raise ValueError(_truncated(file, end, size, "its header speaks of"))
    return entries


def _truncated(file: Path, expected: int, size: int, says: str) -> str:
    share = 100 * size // expected
    return (
        f"{file}: cannot be read: {says} {expected:,} bytes, and the file has {size:,} ({share} %): "
        "it was not written or downloaded to its end; download it again"
    )
