"""What SM12x's block-scaled MMAs read, traced in machine code from each MMA back to the loads and constants.

`QMMA.SF D, A, B, C, SFA, SFB, UR` takes four registers of A, two of B, four of C, a scale word of each operand, and in
UR which scale of the words it means: A's byte in bits 1..0, B's in bits 4..3, and in bits 2 and 6..5 which lanes have
the words (csrc/tile/sm12x/mma.cuh reads selector 0's). So does `OMMA.SF`, whose operands are FP4 alone. No public
manual says so; the positions follow from what ptxas makes of each selector that PTX can name.

In every tile of MXFP8 rows, step s of K = 32 takes byte s of both words; the weights' registers are containers, the odd
k's from the even k's word rotated by 4, without a bit outside of 5..2. In every tile of FP4 rows, an MMA's weights are
words of two steps of 32, 2s and 2s + 1, as they were loaded; of MXFP4 it takes half s of both scale words, of NVFP4 all
of the words of set s. Activations and scales are what was loaded, bit for bit; and all come from their own part of one
stage of shared memory (csrc/tile/tile_shape.cuh). Offsets are an address's constant part: the stage, where it is a
constant, and the place in it, never the lane's row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from wheelbuild import BuildError
from wheelbuild.data_flow import DataFlow, Origin, Register, parse_register
from wheelbuild.machine_code import Code, Instruction

_BYTES = (0x00, 0x09, 0x12, 0x1B)  # the selectors of bytes 0 to 3 of both scale words, from thread selector 0's lanes


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """The MMA of a kernel, and the selectors of those of a K tile."""

    opcode: str
    shape: str
    types: Mapping[str, str]  # by the operand that has the weights
    scales: str
    selectors: tuple[int, ...]
    scale_sets: int = 1  # words of scales that a row has in a K tile

    @property
    def is_fp4(self) -> bool:
        return self.opcode == "OMMA.SF"

    def name(self, weights: str) -> str:
        return f"{self.opcode}.{self.shape}.F32.{self.types[weights]}.{self.scales}"


_FP4_TYPES = dict.fromkeys("AB", "E2M1.E2M1")
KINDS = {  # by pair of formats
    "mxfp4_mxfp8": Instructions(
        opcode="QMMA.SF",
        shape="16832",
        types={"A": "E2M1.E4M3", "B": "E4M3.E2M1"},
        scales="E8",
        selectors=_BYTES,
    ),
    "mxfp4_mxfp4": Instructions(
        opcode="OMMA.SF", shape="16864", types=_FP4_TYPES, scales="E8", selectors=(_BYTES[0], _BYTES[2])
    ),
    "nvfp4_nvfp4": Instructions(
        opcode="OMMA.SF", shape="16864", types=_FP4_TYPES, scales="UE4M3.4X", selectors=_BYTES[:1], scale_sets=2
    ),
}
OPCODES = tuple(dict.fromkeys(kind.opcode for kind in KINDS.values()))
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
    act_scale_set_bytes: int  # of all rows' first words

    @property
    def step_bytes(self) -> int:
        return (self.block_bytes - self.block_scale_bytes) // 4

    def locate(self, byte: int) -> tuple[str, int, int]:
        """(part, stage, step) of an offset; of scales the set of words; the step is 0 where the part has none."""
        if 0 <= byte < self.stages * self.act_bytes:
            return "activations", byte // self.act_bytes, 0
        byte -= self.stages * self.act_bytes
        if 0 <= byte < self.stages * self.weight_bytes:
            stage, within = byte // self.weight_bytes, byte % self.block_bytes - self.block_scale_bytes
            if within < 0:
                return "weight scales", stage, (within + self.block_scale_bytes) // 256
            return "weights", stage, within // self.step_bytes
        byte -= self.stages * self.weight_bytes
        if 0 <= byte < self.stages * self.act_scale_bytes:
            return (
                "activation scales",
                byte // self.act_scale_bytes,
                byte % self.act_scale_bytes // self.act_scale_set_bytes,
            )
        return "no operand", 0, 0


def _address(load: Instruction) -> int:
    """The constant part of a load's address, such as 0x6100 of [R3+UR5+0x6100]."""
    match = re.search(r"\+(-?0x[0-9a-f]+)\]$", load.operands[1])
    return int(match[1], 16) if match else 0


def _words(instruction: Instruction) -> str:
    return f"{instruction.opcode} {', '.join(instruction.operands)} at 0x{instruction.address:x}"


class _Mma:
    """One block-scaled MMA and what its operands are; `weights` is the operand that has the weights, "A" or "B"."""

    def __init__(
        self,
        where: str,
        flow: DataFlow,
        block: int,
        place: int,
        kind: Instructions,
        weights: str,
        memory: SharedMemory,
    ) -> None:
        self._where, self._flow, self._block, self._place, self._memory = where, flow, block, place, memory
        self._kind = kind
        self._mma = flow.blocks[block][place]
        self._operands = dict(zip(_OPERANDS, self._mma.operands, strict=False))
        if len(self._mma.operands) != len(_OPERANDS):
            raise self._refusal(f"has {len(self._mma.operands)} operands, expected {', '.join(_OPERANDS)}")
        expected = kind.name(weights)
        if self._mma.opcode != expected:
            raise self._refusal(f"is {self._mma.opcode}, expected {expected}: this tile's weights are {weights}")
        self.selector = self._one("the selector", "constant", self._trace("the selector", self._constant))
        if self.selector not in kind.selectors:
            known = ", ".join(f"0x{selector:02x}" for selector in kind.selectors)
            raise self._refusal(
                f"has selector 0x{self.selector:02x}, expected one of {known}: the same byte of both scale words, of "
                "thread 0"
            )
        rows = "B" if weights == "A" else "A"
        stages, self.place_in_k_tile = self._packed(weights) if kind.is_fp4 else self._containers(weights)
        stages |= self._loaded(rows, "LDSM", "activations")
        stages |= self._scales(f"SF{weights}", "weight scales") | self._scales(f"SF{rows}", "activation scales")
        self._one("its operands", "stage", stages)
        self._trace("C", self._accumulator)

    def _refusal(self, what: str) -> BuildError:
        return BuildError(f"{self._where}: {self._kind.opcode} at 0x{self._mma.address:x} {what}")

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
        if not zero and not origin.instruction.is_a(self._kind.opcode):
            raise self._unexpected(name, origin, f"{self._kind.opcode} or zero")

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

    def _scales(self, name: str, part: str) -> set[int]:
        """The stages from which a scale word was loaded, of the set that the MMA's k have."""
        found = self._trace(name, lambda n, origin: self._load(n, origin, "LDS", part))
        wanted = self.place_in_k_tile if self._kind.scale_sets > 1 else 0
        if wrong := {scale_set for _, scale_set in found} - {wanted}:
            raise self._refusal(f"takes {name} from set {min(wrong)} of the {part}, expected {wanted}")
        return {stage for stage, _ in found}

    def _packed(self, name: str) -> tuple[set[int], int]:
        """The stages of packed weights, and which MMA of a K tile this is: its first registers are words of codes of
        one step, the others of the next one, as they were loaded.
        """
        half = _REGISTERS[name] // 2
        halves = []
        for first in (0, half):
            parts = range(first, first + half)
            halves.append(self._trace(name, lambda n, origin: self._load(n, origin, "LDS", "weights"), only=parts))
        steps = [self._one(f"half of {name}", "step", {step for _, step in found}) for found in halves]
        if steps[0] % 2 or steps[1] != steps[0] + 1:
            raise self._refusal(f"takes {name} from steps {steps[0]} and {steps[1]}, expected an even one and the next")
        selectors, place = self._kind.selectors, steps[0] // 2
        if len(selectors) > 1 and selectors[place] != self.selector:
            raise self._refusal(
                f"has selector 0x{self.selector:02x} for weights of step {steps[0]}, expected 0x{selectors[place]:02x}"
            )
        return {stage for found in halves for stage, _ in found}, place

    def _containers(self, name: str) -> tuple[set[int], int]:
        """The stages of the FP4 operand beside FP8, and the step: its first registers are masked words of codes of the
        selector's step, the others the same words, rotated by 4 before they are masked.
        """
        half = _REGISTERS[name] // 2
        stages = set()
        selectors = self._kind.selectors
        for part in range(half):
            even = self._trace(name, lambda n, origin: self._container(n, origin, rotated=False), only=[part])
            odd = self._trace(name, lambda n, origin: self._container(n, origin, rotated=True), only=[part + half])
            if set().union(*even) != set().union(*odd):
                raise self._refusal(f"takes the even and the odd k of {name} from different words")
            for word in set().union(*even):
                stage, step = self._load(name, word, "LDS", "weights")
                if selectors[step] != self.selector:
                    raise self._refusal(
                        f"has selector 0x{self.selector:02x} for weights of step {step} "
                        f"({_words(word.instruction)}), expected 0x{selectors[step]:02x}"
                    )
                stages.add(stage)
        return stages, selectors.index(self.selector)

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


def check_block_scaled(library: str, arch: str, code: Code, expect: Mapping[str, Any]) -> dict[str, Any]:
    """Every block-scaled MMA reads what it should, and in each kernel as many are of each part of a K tile; BuildError
    says which does not. Returns how many there are, their types and their selectors, for the report.

    `expect`: `pair` of formats; `weights`, the operand "A" or "B" that has them; and `shared_memory`, the fields of
    SharedMemory.
    """
    memory, kind, weights = SharedMemory(**expect["shared_memory"]), KINDS[expect["pair"]], str(expect["weights"])
    taken: list[int] = []
    for kernel in code.kernels.values():
        flow = DataFlow(kernel)
        mmas = [
            _Mma(f"{library} on sm_{arch}", flow, block, place, kind, weights, memory)
            for block, instructions in enumerate(flow.blocks)
            for place, instruction in enumerate(instructions)
            if instruction.is_a(kind.opcode)
        ]
        steps = 2 if kind.is_fp4 else 4
        counts = [sum(mma.place_in_k_tile == step for mma in mmas) for step in range(steps)]
        if len(set(counts)) != 1:
            having = ", ".join(f"{count} have step {step}" for step, count in enumerate(counts))
            raise BuildError(
                f"{library} on sm_{arch}: of {len(mmas)} {kind.opcode} {having}; expected as many each, one step of a "
                "K tile"
            )
        taken += [mma.selector for mma in mmas]
    selectors = {f"0x{selector:02x}": taken.count(selector) for selector in kind.selectors}
    return {"mma": len(taken), "types": kind.types[weights], "selectors": selectors}
