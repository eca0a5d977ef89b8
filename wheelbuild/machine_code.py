"""Reading what the compiler made: ptxas's account of registers and spills, and the instructions in a library."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# What the report counts. A name matches an opcode that is it, or that continues it after a dot.
COUNTED = (
    "QMMA",
    "QMMA.SF",
    "HMMA",
    "LDSM",
    "LDS",
    "FFMA",
    "F2FP",
    "UTMALDG",
    "UBLKCP",
    "R2UR",
    "BRA.U.ANY",
    "LDL",
    "STL",
)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """One kernel on one arch, in ptxas's words."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def parse_ptxas(text: str) -> list[Resources]:
    """Resources of every kernel in the output of `nvcc -Xptxas -v`."""
    found = []
    entries = re.split(r"Compiling entry function '", text)[1:]
    for entry in entries:
        head = re.match(r"([^']+)' for 'sm_(\w+)'", entry)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        used = re.search(r"Used (\d+) registers", entry)
        if head and memory and used:
            found.append(
                Resources(
                    kernel=head[1],
                    arch=head[2],
                    registers=int(used[1]),
                    stack_bytes=int(memory[1]),
                    spill_store_bytes=int(memory[2]),
                    spill_load_bytes=int(memory[3]),
                )
            )
    return found


def is_instance(kernel: str, function: str, pair: str = "") -> bool:
    """Whether a kernel, by its mangled name, is an instance of this template of csrc/tile, for a pair of formats.

    The pair is in the name of the template's argument, a type of csrc/tile/tile.cu.
    """
    return f"{len(function)}{function}I" in kernel and (not pair or f"_{pair}" in kernel)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, e.g. QMMA.SF.16832.F32.E4M3.E2M1.E8
    target: int | None  # where a branch goes
    conditional: bool = False  # it has a guard, or a branch has a condition among its operands
    operands: tuple[str, ...] = ()  # what it writes first, e.g. ("R16", "[R3+UR5+0x6100]")

    def is_a(self, name: str) -> bool:
        return self.opcode == name or self.opcode.startswith(name + ".")


@dataclass(kw_only=True)
class Code:
    """The instructions of one arch in a library, by kernel."""

    kernels: dict[str, list[Instruction]] = field(default_factory=dict)

    def instructions(self) -> Iterator[Instruction]:
        return (instruction for kernel in self.kernels.values() for instruction in kernel)

    def of(self, function: str, pair: str = "") -> Code:
        """The kernels that are instances of this template of csrc/tile, for a pair of formats."""
        return Code(kernels={name: code for name, code in self.kernels.items() if is_instance(name, function, pair)})

    def has_each_once(self, functions: Mapping[str, str]) -> bool:
        """Whether the kernels are one of each of these templates, by pair, and none besides."""
        found = [self.of(function, pair).kernels for pair, function in functions.items()]
        return len(self.kernels) == len(functions) and all(len(kernels) == 1 for kernels in found)

    def count(self, name: str) -> int:
        return sum(instruction.is_a(name) for instruction in self.instructions())

    def calls_of_functions_with(self, name: str) -> int:
        """How many calls there are of functions that have this instruction, from their begin to their first return."""
        found = 0
        for kernel in self.kernels.values():
            calls = [instruction for instruction in kernel if instruction.is_a("CALL")]
            for target in (int(call.operands[0], 16) for call in calls):
                body = (instruction for instruction in kernel if instruction.address >= target)
                until = itertools.takewhile(lambda instruction: not instruction.is_a("RET"), body)
                found += any(instruction.is_a(name) for instruction in until)
        return found

    def waterfalls(self, opcode: str) -> int:
        """How many loops over the lanes of a warp (branches .U.ANY back) have this instruction inside.

        ptxas wraps an instruction in one when an operand that must be uniform is not known to be: ten times the cost.
        """
        found = 0
        for kernel in self.kernels.values():
            places = [instruction.address for instruction in kernel if instruction.is_a(opcode)]
            for branch in kernel:
                if branch.is_a("BRA.U.ANY") and branch.target is not None:
                    found += any(branch.target <= place < branch.address for place in places)
        return found

    def counts(self) -> dict[str, int]:
        """Instruction counts for the report; `total` leaves out the padding after the last instruction."""
        total = sum(instruction.opcode != "NOP" for instruction in self.instructions())
        return {"total": total} | {name: self.count(name) for name in COUNTED}


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")


def parse_sass(text: str) -> dict[str, Code]:
    """Instructions by arch, from the output of `cuobjdump -sass`."""
    code: dict[str, Code] = {}
    current = Code()
    kernel: list[Instruction] = []
    for line in text.splitlines():
        if line.startswith("arch = sm_"):
            current = code.setdefault(line.removeprefix("arch = sm_").strip(), Code())
        elif "Function :" in line:
            kernel = current.kernels.setdefault(line.split(":", 1)[1].strip(), [])
        elif match := _INSTRUCTION.match(line):
            target = re.search(r"0x([0-9a-f]+)", match[4]) if match[3].startswith("BRA") else None
            kernel.append(
                Instruction(
                    address=int(match[1], 16),
                    opcode=match[3],
                    target=int(target[1], 16) if target else None,
                    conditional=match[2] is not None or (target is not None and "," in match[4]),
                    operands=tuple(word.strip().removesuffix(".reuse") for word in match[4].split(",") if word.strip()),
                )
            )
    return code


_LOSS = re.compile(
    r"ptxas \w+\s*: (\(C\d+\) (?:Potential Performance Loss: .*|.*wgmma\.mma_async instructions are serialized.*))"
)


def performance_losses(text: str) -> list[str]:
    """What ptxas gave up, in its words, such as "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; ...".

    Or "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...", with which each of
    Hopper's asynchronous MMAs waits for the one before it.
    """
    return [line.strip() for line in _LOSS.findall(text)]


def _cuobjdump(cuobjdump: Path, option: str, library: Path) -> str:
    result = subprocess.run([str(cuobjdump), option, str(library)], capture_output=True, text=True, check=False)
    return result.stdout


def read_sass(cuobjdump: Path, library: Path) -> Mapping[str, Code]:
    return parse_sass(_cuobjdump(cuobjdump, "-sass", library))


def undefined_symbols(cuobjdump: Path, library: Path) -> list[str]:
    """Functions that the machine code calls and the driver must bring, such as __cuda_syscall_*; sorted, each once."""
    lines = _cuobjdump(cuobjdump, "-symbols", library).splitlines()
    return sorted({words[-1] for words in map(str.split, lines) if words[:1] == ["FUNC"] and words[-2:-1] == ["U"]})


def has_ptx(cuobjdump: Path, library: Path) -> bool:
    return "PTX file" in _cuobjdump(cuobjdump, "-lptx", library)
