"""What an ELF file says about itself: its size, processor, and the libraries and symbol versions that it needs.

64-bit little-endian files alone, which is what every wheel has. Nothing is loaded; the structures are those of the
System V ABI, "Object Files", and of the LSB, "Symbol Versioning".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_NEED = struct.Struct("<HHIII")  # Elf64_Verneed: version, count, file, first Vernaux, next Verneed
_NEED_VERSION = struct.Struct("<IHHII")  # Elf64_Vernaux: hash, flags, other, name, next Vernaux

_LOAD, _DYNAMIC_SEGMENT = 1, 2
_NEEDED, _STRINGS, _VERSIONS, _VERSIONS_COUNT = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF

MACHINES = {62: "x86_64", 183: "aarch64"}  # by platform.machine()'s names


class ElfError(ValueError):
    """The file is no whole 64-bit ELF file; the message says what is wrong with it, as a predicate."""


@dataclass(frozen=True, kw_only=True)
class Elf:
    machine: str
    needed: tuple[str, ...]  # sonames, such as libcudart.so.13
    versions: Mapping[str, tuple[str, ...]]  # soname -> versions that it must have, such as GLIBC_2.34


def read_elf(data: bytes) -> Elf:
    """What this library needs.

    Raises:
        ElfError: no ELF header, fewer bytes than the headers say, or a dynamic section that makes no sense.
    """
    if len(data) < _HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        raise ElfError(f"is no library: {len(data):,} bytes without the header of one")
    size = _size(data)
    if len(data) < size:
        raise ElfError(f"is truncated: {len(data):,} of {size:,} bytes")
    number = _HEADER.unpack_from(data)[2]
    try:
        needed, versions = _dependencies(data)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ElfError(f"is damaged: its dynamic section cannot be read ({error})") from error
    return Elf(machine=MACHINES.get(number, f"machine {number}"), needed=needed, versions=versions)


def _size(data: bytes) -> int:
    """Bytes that the headers say the file has, as far as they are there."""
    *_, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _ = _HEADER.unpack_from(data)
    ends = [phoff + phentsize * phnum, shoff + shentsize * shnum]
    ends += [offset + size for _, offset, _, size in _segments(data)]
    return int(max(ends))


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, offset in the file, address, and size in the file of each segment whose header is there."""
    *_, phoff, _, _, _, phentsize, phnum, _, _, _ = _HEADER.unpack_from(data)
    for place in range(phnum):
        at = phoff + phentsize * place
        if at + _PROGRAM_HEADER.size <= len(data):
            kind, _, offset, address, _, size, _, _ = _PROGRAM_HEADER.unpack_from(data, at)
            yield kind, offset, address, size


def _dependencies(data: bytes) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    segments = list(_segments(data))

    def offset_of(address: int) -> int:
        for kind, offset, begin, size in segments:
            if kind == _LOAD and begin <= address < begin + size:
                return address - begin + offset
        raise ValueError(f"address {address:#x} is in no segment")

    dynamic: list[tuple[int, int]] = []
    for kind, offset, _, size in segments:
        if kind == _DYNAMIC_SEGMENT:
            dynamic = list(_DYNAMIC.iter_unpack(data[offset : offset + size - size % _DYNAMIC.size]))
    entries = dict(dynamic)
    if _STRINGS not in entries:
        return (), {}
    strings = offset_of(entries[_STRINGS])

    def text(at: int) -> str:
        return data[strings + at : data.index(b"\0", strings + at)].decode()

    needed = tuple(text(value) for tag, value in dynamic if tag == _NEEDED)
    versions: dict[str, tuple[str, ...]] = {}
    at = offset_of(entries[_VERSIONS]) if _VERSIONS in entries else 0
    for _ in range(entries.get(_VERSIONS_COUNT, 0)):
        _, count, file, first, following = _NEED.unpack_from(data, at)
        place, names = at + first, []
        for _ in range(count):
            *_, name, step = _NEED_VERSION.unpack_from(data, place)
            names.append(text(name))
            place += step
        versions[text(file)] = tuple(names)
        at += following
    return needed, versions
