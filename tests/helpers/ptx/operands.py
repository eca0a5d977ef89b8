"""Operands of instructions as Python expressions: registers, immediates, special registers, addresses."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import Fault, Kind
from .parse import Instruction
from .scalar import DTYPES

if TYPE_CHECKING:
    from .translate import Program

_SPECIAL = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%cluster_ctarank", "%cluster_nctarank"),
)


class Operands:
    """What a unit's writer needs of its program; `lines` is the Python text so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lines: list[str] = []

    def refuse(self, i: Instruction, what: str = "") -> Fault:
        return Fault(Kind.UNKNOWN, what or i.name, i.place)

    def _constant(self, kind: str, value: Any) -> str:
        array = np.full(32, value, DTYPES[kind])
        array.flags.writeable = False
        key = (kind, array[:1].tobytes())
        if key not in self.program.constants:
            name = f"K{len(self.program.constants)}"
            self.program.constants[key] = name
            self.program.names[name] = array
        return self.program.constants[key]

    def _literal(self, text: str, kind: str, i: Instruction) -> str:
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            bits = int(found[1], 16)
            if kind == "f32":
                return self._constant(kind, np.frombuffer(struct.pack("<I", bits), np.float32)[0])
            return self._constant(kind, bits)
        if kind == "pred" and text in ("0", "1", "-1"):
            return self._constant(kind, text != "0")
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text) and kind not in ("f32", "pred"):
            value = int(text.rstrip("U"), 0)
            bits = DTYPES[kind]().itemsize * 8
            value &= (1 << bits) - 1
            if DTYPES[kind]().dtype.kind == "i" and value >> (bits - 1):
                value -= 1 << bits
            return self._constant(kind, value)
        raise self.refuse(i, f"operand {text} of {i.name}")

    def read(self, text: str, kind: str, i: Instruction) -> str:
        """An expression for an operand as an array of this type."""
        text = text.strip()
        program = self.program
        if text in program.numbers:
            stored = program.kernel.type_of(text)
            if stored not in DTYPES:
                raise self.refuse(i, f"register type {stored}")
            return _converted(self._now(text), stored, kind, i)
        if text in _SPECIAL:
            return f"w.special[{text!r}]"
        if text in program.symbols:
            return self._constant(kind, program.symbols[text])
        return self._literal(text, kind, i)

    def address(self, text: str, i: Instruction) -> str:
        """[register + offset] as int64 addresses."""
        found = re.fullmatch(r"\[\s*([^+\s\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", text.strip())
        if found is None:
            raise self.refuse(i, f"address {text} of {i.name}")
        wide = found[1] not in self.program.numbers or self.program.kernel.type_of(found[1]) == "b64"
        base = f"{self.read(found[1], 'u64' if wide else 'u32', i)}.astype(i8)"
        return f"{base} + {int(found[2])}" if found[2] and int(found[2]) else base

    def assign(self, register: str, expression: str, kind: str, mask: str, i: Instruction) -> None:
        if register == "_":
            return
        program = self.program
        if register not in program.numbers:
            raise self.refuse(i, f"destination {register} of {i.name}")
        stored = program.kernel.type_of(register)
        value = _stored(expression, kind, stored, i)
        target = f"R[{program.numbers[register]}]"
        if mask != "None":
            value = f"np.where({mask}, {value}, {self._now(register)})"
        self.lines.append(f"{target} = {value}")

    def _now(self, register: str) -> str:
        """What it holds as its declared type (PTX for sm_90a declares .f32 ones), computed if it was promised."""
        program, held = self.program, f"R[{self.program.numbers[register]}]"
        if register not in program.promised:
            return held
        return f"force({held}).view(np.{DTYPES[program.kernel.type_of(register)]().dtype.name})"


def vector(operand: str) -> list[str]:
    return [word.strip() for word in operand.strip("{}").split(",")]


def pair(operand: str) -> tuple[str, str]:
    """%r1|%p1; the predicate may be missing."""
    first, _, second = operand.partition("|")
    return first.strip(), second.strip() or "_"


def _converted(expression: str, stored: str, kind: str, i: Instruction) -> str:
    """A register of a declared type read as an operand's type: the same bits, or the low ones of a wider register."""
    if kind == "pred" or stored == "pred":
        if kind != stored:
            raise Fault(Kind.UNKNOWN, f"{stored} read as {kind}", i.place)
        return expression
    have, want = DTYPES[stored]().dtype, DTYPES[kind]().dtype
    if have == want:
        return expression
    if have.itemsize == want.itemsize:
        return f"{expression}.view(np.{want.name})"
    if want.itemsize < have.itemsize and want.kind in "iu":
        return f"{expression}.astype(np.{want.name})"
    if kind.startswith(("u", "b")) and i.name.startswith(("ld.", "st.", "mov.u32")) and stored in ("b32",):
        return f"{expression}.astype(np.{want.name})"
    raise Fault(Kind.UNKNOWN, f"{stored} register read as {kind}", i.place)


def _stored(expression: str, kind: str, stored: str, i: Instruction) -> str:
    """A result of a type as a register's declared type holds it: wider ones are extended by the result's sign."""
    if kind == "pred" or stored == "pred":
        if kind != stored:
            raise Fault(Kind.UNKNOWN, f"{kind} written to {stored}", i.place)
        return expression
    have, want = DTYPES[kind]().dtype, DTYPES[stored]().dtype
    if have == want:
        return f"({expression})"
    if have.itemsize == want.itemsize:
        return f"({expression}).view(np.{want.name})"
    if have.itemsize < want.itemsize and have.kind in "iu":
        signed = f"{have.kind}{want.itemsize}"
        wide = f"({expression}).astype(np.{np.dtype(signed).name})"
        return wide if want.kind == have.kind else f"{wide}.view(np.{want.name})"
    raise Fault(Kind.UNKNOWN, f"{kind} written to a {stored} register", i.place)
