"""Where a register's value comes from: the instructions of a kernel that may have written it last.

A listing names what an instruction writes first, and says by the opcode how many registers that is. An instruction
under a guard may not run, so what it overwrites is looked for too; where the search reaches the kernel's begin, nobody
wrote the register.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wheelbuild.control_flow import basic_blocks, predecessors, successors
from wheelbuild.machine_code import Instruction

_REGISTER = re.compile(r"(U?R)(\d+)")
_PREDICATE = re.compile(r"!?U?P(\d|T)")
_WRITES_PREDICATES = re.compile(r"\w+SETP2?|U?PLOP3|FCHK|R2P")  # and no register
_READS_ALL = ("BRX", "JMX", "RET", "CALL", "BAR", "WARPSYNC", "NANOSLEEP")
_MMA = ("QMMA", "OMMA", "HMMA", "IMMA", "DMMA")
_COPIES = {"MOV": 1, "MOV.64": 1, "UMOV": 1, "UMOV.64": 1, "IMAD.MOV.U32": 3}  # opcode -> the operand that it copies


@dataclass(frozen=True, kw_only=True, order=True)
class Register:
    file: str  # "R", one per lane, or "UR", one per warp
    number: int

    def plus(self, offset: int) -> Register:
        return Register(file=self.file, number=self.number + offset)


def parse_register(operand: str) -> Register | None:
    """The register that an operand is; None for a constant, RZ and URZ among them, an address or a predicate."""
    match = _REGISTER.fullmatch(operand)
    return Register(file=match[1], number=int(match[2])) if match else None


def _width(instruction: Instruction) -> int:
    """How many registers the result has."""
    name, *modifiers = instruction.opcode.split(".")
    if name in _MMA:
        return 4
    if name == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if "128" in modifiers:
        return 4
    if "64" in modifiers or "WIDE" in modifiers or "F64" in modifiers or (name == "CS2R" and "32" not in modifiers):
        return 2
    return 1


def written(instruction: Instruction) -> tuple[Register, ...]:
    """The registers that an instruction writes."""
    name = instruction.opcode.split(".")[0]
    if name in _READS_ALL or _WRITES_PREDICATES.fullmatch(name):
        return ()
    operands = list(instruction.operands)
    while operands and _PREDICATE.fullmatch(operands[0]):
        operands.pop(0)
    first = parse_register(operands[0]) if operands else None
    return tuple(first.plus(offset) for offset in range(_width(instruction))) if first else ()


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A value as one instruction made it: its `part`-th register."""

    block: int
    place: int  # in the block
    instruction: Instruction
    part: int


class DataFlow:
    """The last writers of registers in one kernel."""

    def __init__(self, kernel: Sequence[Instruction]) -> None:
        self.blocks = basic_blocks(kernel)
        self._before = predecessors(successors(self.blocks))
        self._writers: list[dict[Register, list[tuple[int, int]]]] = []  # by block: places and parts
        for block in self.blocks:
            writers: dict[Register, list[tuple[int, int]]] = {}
            for place, instruction in enumerate(block):
                for part, register in enumerate(written(instruction)):
                    writers.setdefault(register, []).append((place, part))
            self._writers.append(writers)

    def writers(self, block: int, place: int, register: Register) -> set[Origin | None]:
        """Who may have written `register` last when the instruction at this place runs; None stands for nobody."""
        found: set[Origin | None] = set()
        seen: set[int] = set()
        todo = [(block, place)]
        while todo:
            at, end = todo.pop()
            certain = False
            for wrote, part in reversed(self._writers[at].get(register, ())):
                if wrote < end:
                    instruction = self.blocks[at][wrote]
                    found.add(Origin(block=at, place=wrote, instruction=instruction, part=part))
                    certain = not instruction.conditional
                    if certain:
                        break
            if certain:
                continue
            if at == 0:
                found.add(None)
            for before in self._before[at]:
                if before not in seen:
                    seen.add(before)
                    todo.append((before, len(self.blocks[before])))
        return found

    def origins(self, block: int, place: int, register: Register) -> set[Origin | None]:
        """`writers`, with copies from register to register followed to what they copy."""
        found: set[Origin | None] = set()
        seen: set[Origin | None] = set()
        todo = list(self.writers(block, place, register))
        while todo:
            origin = todo.pop()
            if origin in seen:
                continue
            seen.add(origin)
            copied = origin and _copied(origin)
            if origin and copied:
                todo += self.writers(origin.block, origin.place, copied)
            else:
                found.add(origin)
        return found


def _copied(origin: Origin) -> Register | None:
    """The register that a copy has its value from."""
    operand = _COPIES.get(origin.instruction.opcode)
    if operand is None or operand >= len(origin.instruction.operands):
        return None
    source = parse_register(origin.instruction.operands[operand])
    return source.plus(origin.part) if source else None
