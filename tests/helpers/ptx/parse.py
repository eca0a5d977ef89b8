"""PTX text -> kernels: parameters, registers, shared variables, and instructions with resolved labels.

Only what nvcc emits for this project's kernels is understood; a directive that is not known by name is a fault, like
an instruction that the other modules do not know. Names inside a brace scope ({ .reg .pred done; ... }), as inline
assembly brings them, get the scope's number, so that every name is unique in its kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .faults import Fault, Kind

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+([\w$]+)\s*\(")
_VARIABLE = re.compile(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_NAME = re.compile(r"[%A-Za-z_$][\w$]*")
_IGNORED = (".pragma", ".loc", ".file")
_LIMITS = (".maxntid", ".minnctapersm", ".reqntid", ".maxnreg", ".explicitcluster")


@dataclass(frozen=True)
class Instruction:
    """One statement: an optional guard, a name with its modifiers, and its operands as text."""

    name: str
    operands: tuple[str, ...]
    guard: str = ""  # the predicate's register, or empty
    negated: bool = False
    label: str = ""  # the last label before it
    target: int = -1  # of a branch: index of the instruction

    @property
    def text(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}".rstrip()

    @property
    def place(self) -> str:
        return f"{self.label or 'entry'}: {self.text}"


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, int, int]] = field(default_factory=list)  # name, alignment, bytes
    registers: dict[str, str] = field(default_factory=dict)  # name or prefix of numbered ones -> type
    shared: list[tuple[str, int, int]] = field(default_factory=list)  # name, alignment, bytes
    dynamic_shared: tuple[str, int] | None = None  # name, alignment
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def type_of(self, register: str) -> str:
        """A register's declared type: pred, b16, b32, b64, f32 ..."""
        found = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if found is None:
            raise Fault(Kind.UNKNOWN, f"register {register} is not declared in {self.name}")
        return found

    def is_register(self, name: str) -> bool:
        return name in self.registers or (name.startswith("%") and name.rstrip("0123456789") in self.registers)


def parse(text: str) -> dict[str, Kernel]:
    """All kernels of a PTX file, by name."""
    text = _COMMENT.sub("", text)
    kernels: dict[str, Kernel] = {}
    module_shared: list[tuple[str, int, int]] = []
    dynamic: tuple[str, int] | None = None
    position = 0
    entries = list(_ENTRY.finditer(text))
    for statement in text[: entries[0].start() if entries else len(text)].split(";"):
        if ".shared" not in statement:
            continue
        found = _VARIABLE.search(statement)
        if found is None:
            raise Fault(Kind.UNKNOWN, f"shared variable not understood: {statement.strip()}")
        if ".extern" in statement:
            dynamic = (found[2], int(found[1]))
        else:
            module_shared.append((found[2], int(found[1]), int(found[3])))
    for entry in entries:
        if entry.start() < position:
            continue
        kernel = Kernel(entry[1], shared=list(module_shared), dynamic_shared=dynamic)
        heading_end = text.index("{", entry.end())
        heading = text[entry.end() : heading_end]
        params, _, limits = heading.partition(")")
        for param in filter(str.strip, params.split(",")):
            kernel.params.append(_param(param))
        for word in re.findall(r"\.[a-z]+", limits):
            if word not in _LIMITS:
                raise Fault(Kind.UNKNOWN, f"directive {word} of {kernel.name}")
        position = _body(text, heading_end + 1, kernel)
        kernels[kernel.name] = kernel
    return kernels


def _param(text: str) -> tuple[str, int, int]:
    if found := _VARIABLE.search(text):
        return found[2], int(found[1]), int(found[3])
    if found := re.search(r"\.param\s+\.[busf](\d+)\s+([\w$]+)", text):
        return found[2], int(found[1]) // 8, int(found[1]) // 8
    raise Fault(Kind.UNKNOWN, f"parameter not understood: {text.strip()}")


def _body(text: str, position: int, kernel: Kernel) -> int:
    """Reads statements up to the brace that closes the kernel; returns the position behind it."""
    scopes: list[dict[str, str]] = [{}]  # of each open brace: name as written -> unique name
    scope_number, label = 0, ""
    label_pattern = re.compile(r"\s*([\w$]+)\s*:(?!:)")
    skip = re.compile(r"\s*")

    def rename(name: str) -> str:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return name

    while True:
        position = skip.match(text, position).end()  # type: ignore[union-attr]
        if text[position] == "{":
            scope_number += 1
            # Names of the whole scope first: a branch may stand before its label.
            scopes.append(_scope_names(text, position + 1, scope_number))
            position += 1
            continue
        if text[position] == "}":
            scopes.pop()
            position += 1
            if not scopes:
                break
            continue
        if found := label_pattern.match(text, position):
            label = rename(found[1])
            kernel.labels[label] = len(kernel.instructions)
            position = found.end()
            continue
        end = text.index(";", position)
        statement = " ".join(text[position:end].split())
        position = end + 1
        if not statement or statement.startswith(_IGNORED):
            continue
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for name in names.split(","):
                kernel.registers[rename(re.sub(r"<\d+>", "", name).strip())] = kind.lstrip(".")
        elif statement.startswith(".shared"):
            found = _VARIABLE.search(statement)
            if found is None:
                raise Fault(Kind.UNKNOWN, f"shared variable not understood: {statement}")
            kernel.shared.append((found[2], int(found[1]), int(found[3])))
        elif statement.startswith("."):
            raise Fault(Kind.UNKNOWN, f"directive: {statement}")
        else:
            names = _NAME.sub(lambda m: rename(m[0]), statement) if len(scopes) > 1 else statement
            kernel.instructions.append(_instruction(names, label))
    for index, instruction in enumerate(kernel.instructions):
        if instruction.name in ("bra", "bra.uni"):
            target = kernel.labels.get(instruction.operands[0])
            if target is None:
                raise Fault(Kind.UNKNOWN, f"label of {instruction.text}")
            kernel.instructions[index] = Instruction(
                instruction.name,
                instruction.operands,
                instruction.guard,
                instruction.negated,
                instruction.label,
                target,
            )
    return position


def _scope_names(text: str, start: int, number: int) -> dict[str, str]:
    """Registers and labels that a brace scope declares -> names that are unique in the kernel."""
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    inside = text[start:end]
    names: dict[str, str] = {}
    for declaration in re.findall(r"\.reg\s+\.\w+\s+([^;]+);", inside):
        for name in declaration.split(","):
            names[name.strip()] = f"%s{number}_{name.strip().lstrip('%')}_"
    for name in re.findall(r"(?:^|[;\s])([A-Za-z_$][\w$]*)\s*:(?!:)", inside):
        names[name] = f"{name}_{number}"
    return names


def _instruction(statement: str, label: str) -> Instruction:
    guard, negated = "", False
    if found := re.match(r"@(!?)([%\w$]+)\s+", statement):
        guard, negated = found[2], bool(found[1])
        statement = statement[found.end() :]
    name, _, rest = statement.partition(" ")
    return Instruction(name, tuple(_operands(rest)), guard, negated, label)


def _operands(text: str) -> list[str]:
    """Splits at the commas outside of braces and brackets."""
    found, depth, current = [], 0, ""
    for letter in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += letter
    if current.strip():
        found.append(current.strip())
    return found
