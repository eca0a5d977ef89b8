"""What SM12x's block-scaled MMAs read, traced in machine code from each MMA back to the loads and constants.

`QMMA.SF D, A, B, C, SFA, SFB, UR` takes four registers of A, two of B, four of C, a scale word of each operand, and in
UR which scale of the words it means: A's byte in bits 1..0, B's in bits 4..3, and in bits 2 and 6..5 which lanes have
the words (csrc/tile/sm12x/mma.cuh reads selector 0's). No public manual says so; the positions follow from what ptxas
makes of each selector that PTX can name.

In every tile, step s of K = 32 takes byte s of both words; the weights' registers are containers, the odd k's from the
even k's word rotated by 4, without a bit outside of 5..2; activations and scales are what was loaded, bit for bit; and
all come from their own part of one stage of shared memory (csrc/tile/tile_shape.cuh). Offsets are an address's
constant part: the stage, where it is a constant, and the place in it, never the lane's row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from wheelbuild import BuildError
from wheelbuild.data_flow import DataFlow, Origin, Register, parse_register
from wheelbuild.machine_code import Code, Instruction

OPCODE = "QMMA.SF"
SELECTORS = (0x00, 0x09, 0x12, 0x1B)  # bytes 0 to 3 of both scale words, from the lanes of thread selector 0
_TYPES = {"A": "E2M1.E4M3", "B": "E4M3.E2M1"}  # by the operand that is FP4
_MASK = ("0x3c3c3c3c", "RZ", "0xc0", "!PT")  # bits 5..2 of each byte, by LOP3's table of AND
_OPERANDS = ("D", "A", "B", "C", "SFA", "SFB", "the selector")
_REGISTERS = {"A": 4, "B": 2, "C": 4, "SFA": 1, "SFB": 1}

Fact = TypeVar("Fact")


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """The parts of a tile's shared memory, in bytes: arrays over the stages, one behind the other."""

    stages: int
    act_bytes: int
    weight_bytes: int
    act_scale_bytes: int
    block_bytes: int  # of 64 rows of weights: their scales, then four steps of codes
    block_scale_bytes: int

    @property
    def step_bytes(self) -> int:
        return (self.block_bytes - self.block_scale_bytes) // 4

    def locate(self, byte: int) -> tuple[str, int, int]:
        """(part, stage, step) of an offset; the step is 0 where the part has none."""
        if 0 <= byte < self.stages * self.act_bytes:
            return "activations", byte // self.act_bytes, 0
        byte -= self.stages * self.act_bytes
        if 0 <= byte < self.stages * self.weight_bytes:
            stage, within = byte // self.weight_bytes, byte % self.block_bytes - self.block_scale_bytes
            return ("weight scales", stage, 0) if within < 0 else ("weights", stage, within // self.step_bytes)
        byte -= self.stages * self.weight_bytes
        if 0 <= byte < self.stages * self.act_scale_bytes:
            return "activation scales", byte // self.act_scale_bytes, 0
        return "no operand", 0, 0


def _address(load: Instruction) -> int:
    """The constant part of a load's address, such as 0x6100 of [R3+UR5+0x6100]."""
    match = re.search(r"\+(-?0x[0-9a-f]+)\]$", load.operands[1])
    return int(match[1], 16) if match else 0


def _words(instruction: Instruction) -> str:
    return f"{instruction.opcode} {', '.join(instruction.operands)} at 0x{instruction.address:x}"


class _Mma:
    """One QMMA.SF and what its operands are."""

    def __init__(self, where: str, flow: DataFlow, block: int, place: int, fp4: str, memory: SharedMemory) -> None:
        self._where, self._flow, self._block, self._place, self._memory = where, flow, block, place, memory
        self._mma = flow.blocks[block][place]
        self._operands = dict(zip(_OPERANDS, self._mma.operands, strict=False))
        if len(self._mma.operands) != len(_OPERANDS):
            raise self._refusal(f"has {len(self._mma.operands)} operands, expected {', '.join(_OPERANDS)}")
        expected = f"{OPCODE}.16832.F32.{_TYPES[fp4]}.E8"
        if self._mma.opcode != expected:
            raise self._refusal(f"is {self._mma.opcode}, expected {expected}: this tile's FP4 operand is {fp4}")
        self.selector = self._one("the selector", "constant", self._trace("the selector", self._constant))
        if self.selector not in SELECTORS:
            known = ", ".join(f"0x{selector:02x}" for selector in SELECTORS)
            raise self._refusal(
                f"has selector 0x{self.selector:02x}, expected one of {known}: the same byte of both scale words, of "
                "thread 0"
            )
        fp8 = "B" if fp4 == "A" else "A"
        stages = [self._containers(fp4), self._loaded(fp8, "LDSM", "activations")]
        stages += [
            self._loaded(f"SF{fp4}", "LDS", "weight scales"),
            self._loaded(f"SF{fp8}", "LDS", "activation scales"),
        ]
        self._one("its operands", "stage", set().union(*stages))
        self._trace("C", self._accumulator)

    def _refusal(self, what: str) -> BuildError:
        return BuildError(f"{self._where}: {OPCODE} at 0x{self._mma.address:x} {what}")

    def _one(self, what: str, unit: str, found: set[Fact]) -> Fact:
        if len(found) != 1:
            several = ", ".join(sorted(map(str, found)))
            raise self._refusal(f"takes {what} of more than one {unit} ({several}), expected the same on every path")
        return next(iter(found))

    def _trace(self, name: str, fact: Callable[[str, Origin], Fact], only: Sequence[int] = ()) -> set[Fact]:
        """`fact` of everything that an operand's registers may come from; of those `only`, where it is given."""
        text = self._operands[name]
        register = parse_register(text)
        if register is None:
            if text not in ("RZ", "URZ") or name not in ("C", "the selector"):
                raise self._refusal(f"has {text} as {name}, expected a register")
            nothing = Instruction(address=self._mma.address, opcode="MOV", target=None, operands=(text, text))
            return {fact(name, Origin(block=self._block, place=self._place, instruction=nothing, part=0))}
        found: set[Fact] = set()
        for part in only or range(_REGISTERS.get(name, 1)):
            found |= self._follow(name, self._block, self._place, register.plus(part), fact)
        return found

    def _follow(
        self, name: str, block: int, place: int, register: Register, fact: Callable[[str, Origin], Fact]
    ) -> set[Fact]:
        found = set()
        origins = self._flow.origins(block, place, register)
        for origin in sorted(origins, key=lambda origin: origin.instruction.address if origin else -1):
            if origin is None:
                raise self._refusal(f"takes {name} from a register that nothing has written on one path")
            found.add(fact(name, origin))
        return found

    def _unexpected(self, name: str, origin: Origin, expected: str) -> BuildError:
        return self._refusal(f"takes {name} from {_words(origin.instruction)}, expected {expected}")

    def _constant(self, name: str, origin: Origin) -> int:
        source = origin.instruction.operands[1:]
        if origin.instruction.opcode in ("MOV", "UMOV") and len(source) == 1:
            if source[0] in ("RZ", "URZ"):
                return 0
            if re.fullmatch(r"0x[0-9a-f]+", source[0]):
                return int(source[0], 16)
        raise self._unexpected(name, origin, "UMOV of a constant")

    def _accumulator(self, name: str, origin: Origin) -> None:
        """An MMA's result, or zero."""
        zero = origin.instruction.opcode in ("CS2R", "MOV") and origin.instruction.operands[1] in ("SRZ", "RZ")
        if not zero and not origin.instruction.is_a(OPCODE):
            raise self._unexpected(name, origin, f"{OPCODE} or zero")

    def _load(self, name: str, origin: Origin, opcode: str, part: str) -> tuple[int, int]:
        """(stage, step) of a load of this opcode from this part of shared memory."""
        load = origin.instruction
        narrow = re.search(r"\.[US](8|16)(\.|$)", load.opcode)
        if not load.is_a(opcode) or narrow:
            raise self._unexpected(name, origin, f"{opcode} of whole words of {part}, and nothing between")
        lies_in, stage, step = self._memory.locate(_address(load))
        if lies_in != part:
            raise self._unexpected(name, origin, f"an address among the {part}; there are {lies_in}")
        return stage, step

    def _loaded(self, name: str, opcode: str, part: str) -> set[int]:
        """The stages from which an operand was loaded; nothing may have changed it."""
        return {stage for stage, _ in self._trace(name, lambda n, origin: self._load(n, origin, opcode, part))}

    def _containers(self, name: str) -> set[int]:
        """The stages of the FP4 operand: its first registers are masked words of codes of the selector's step, the
        others the same words, rotated by 4 before they are masked.
        """
        half = _REGISTERS[name] // 2
        stages = set()
        for part in range(half):
            even = self._trace(name, lambda n, origin: self._container(n, origin, rotated=False), only=[part])
            odd = self._trace(name, lambda n, origin: self._container(n, origin, rotated=True), only=[part + half])
            if set().union(*even) != set().union(*odd):
                raise self._refusal(f"takes the even and the odd k of {name} from different words")
            for word in set().union(*even):
                stage, step = self._load(name, word, "LDS", "weights")
                if SELECTORS[step] != self.selector:
                    raise self._refusal(
                        f"has selector 0x{self.selector:02x} for weights of step {step} "
                        f"({_words(word.instruction)}), expected 0x{SELECTORS[step]:02x}"
                    )
                stages.add(stage)
        return stages

    def _container(self, name: str, origin: Origin, *, rotated: bool) -> frozenset[Origin]:
        """The loads of the words that were masked here, after a rotation by 4 or without."""
        masked = origin.instruction
        source = parse_register(masked.operands[1]) if len(masked.operands) > 1 else None
        if masked.opcode != "LOP3.LUT" or masked.operands[2:] != _MASK or source is None:
            raise self._unexpected(name, origin, f"LOP3.LUT with {_MASK[0]}, which leaves bits 5..2 of each code")

        def word(name: str, before: Origin) -> frozenset[Origin]:
            shift = before.instruction
            turned = parse_register(shift.operands[1]) if shift.opcode == "SHF.R.W.U32" else None
            if not rotated or turned is None or shift.operands[2:] != ("0x4", shift.operands[1]):
                how = "a word of codes, rotated right by 4" if rotated else "a word of codes as it was loaded"
                if rotated or not shift.is_a("LDS"):
                    raise self._unexpected(name, before, how)
                return frozenset([before])
            return frozenset(self._follow(name, before.block, before.place, turned, lambda _, load: load))

        return frozenset().union(*self._follow(name, origin.block, origin.place, source, word))


def _count(selectors: Iterable[int]) -> dict[str, int]:
    taken = list(selectors)
    return {f"0x{selector:02x}": taken.count(selector) for selector in SELECTORS}


def check_block_scaled(library: str, arch: str, code: Code, expect: Mapping[str, Any]) -> dict[str, Any]:
    """Every QMMA.SF reads what it should, and in each kernel a quarter takes each selector; BuildError says which does
    not. Returns how many there are, their types and their selectors, for the report.

    `expect`: `fp4`, the operand "A" or "B" that has the weights, and `shared_memory`, the fields of SharedMemory.
    """
    memory = SharedMemory(**expect["shared_memory"])
    taken: list[int] = []
    for kernel in code.kernels.values():
        flow = DataFlow(kernel)
        selectors = [
            _Mma(f"{library} on sm_{arch}", flow, block, place, expect["fp4"], memory).selector
            for block, instructions in enumerate(flow.blocks)
            for place, instruction in enumerate(instructions)
            if instruction.is_a(OPCODE)
        ]
        counts = _count(selectors)
        if len(set(counts.values())) != 1:
            having = ", ".join(f"{count} have {selector}" for selector, count in counts.items())
            raise BuildError(
                f"{library} on sm_{arch}: of {len(selectors)} {OPCODE} {having}; expected a quarter each, one step of "
                "a K tile"
            )
        taken += selectors
    return {"mma": len(taken), "types": _TYPES[expect["fp4"]], "selectors": _count(taken)}
