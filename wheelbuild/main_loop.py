"""The main loop of a kernel, found in its machine code: the innermost loops that hold its MMAs.

A loop is what compilers call a natural loop: the blocks from which a branch back to the loop's head is reached without
passing the head. Addresses alone would not do: ptxas moves the slow path of a wait behind the kernel's end, from where
it branches back into the middle of the loop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wheelbuild.control_flow import basic_blocks, successors
from wheelbuild.machine_code import Instruction


@dataclass(frozen=True, kw_only=True)
class MainLoop:
    """Counts of one loop's instructions, with everything inside it: waits, padding, branches."""

    instructions: int
    nops: int
    mma: int
    ldsm: int
    ldsm_matrices: int  # 8 x 16 bytes each; an LDSM brings one, two or four
    lds: tuple[int, int, int]  # LDS of one 32-bit word, of two, of four
    ldg: int = 0

    @property
    def instructions_per_mma(self) -> float:
        return round(self.instructions / self.mma, 2)

    def report(self) -> dict[str, float]:
        return {
            "instructions": self.instructions,
            "nops": self.nops,
            "mma": self.mma,
            "ldsm": self.ldsm,
            "instructions_per_mma": self.instructions_per_mma,
        }


def _dominators(following: Sequence[set[int]]) -> list[int]:
    """Per block the set of blocks that every way to it passes, as bits; 0 for a block that cannot be reached."""
    before: list[list[int]] = [[] for _ in following]
    reached, todo = {0}, [0]
    while todo:
        block = todo.pop()
        for target in following[block]:
            before[target].append(block)
            if target not in reached:
                reached.add(target)
                todo.append(target)
    everything = (1 << len(following)) - 1
    dominators = [everything if block in reached else 0 for block in range(len(following))]
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            meet = everything
            for source in before[block]:
                meet &= dominators[source]
            if (meet | 1 << block) != dominators[block]:
                dominators[block] = meet | 1 << block
                changed = True
    return dominators


def _loops(following: Sequence[set[int]]) -> list[set[int]]:
    """Every loop as the set of its blocks; loops with one head are one."""
    dominators = _dominators(following)
    before: list[list[int]] = [[] for _ in following]
    for block, targets in enumerate(following):
        for target in targets:
            if dominators[block]:
                before[target].append(block)
    loops: dict[int, set[int]] = {}
    for head in range(len(following)):
        ends = [block for block in before[head] if dominators[block] >> head & 1]
        if not ends:
            continue
        body, todo = {head}, ends
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
        loops[head] = body
    return list(loops.values())


def _matrices(instruction: Instruction) -> int:
    wide = re.search(r"\.([24])$", instruction.opcode)
    return int(wide[1]) if wide else 1


def _words(instruction: Instruction) -> int:
    """Of an LDS; one of less than a word counts as none."""
    if re.search(r"\.[US](8|16)$", instruction.opcode):
        return 0
    wide = re.search(r"\.(64|128)$", instruction.opcode)
    return int(wide[1]) // 32 if wide else 1


def _usual_way(body: set[int], blocks: Sequence[Sequence[Instruction]], mma: str) -> set[int]:
    """A loop's blocks without its dearer alternatives: of a branch both of whose ways have MMAs, or multiply operands
    for them (HMUL2), the way that has more instructions for each.

    A way is what only one side of the branch leads to.
    """
    following = successors(blocks)
    dominators = _dominators(following)
    before = {block: {source for source in body if block in following[source]} for block in body}

    def way(first: int) -> set[int]:
        return {block for block in body if dominators[block] >> first & 1}

    def count(of: set[int], name: str) -> int:
        return sum(instruction.is_a(name) for block in of for instruction in blocks[block])

    for branch in sorted(body):
        sides = [side for side in following[branch] if side in body]
        ways = [way(side) for side in sides if branch not in way(side) and before[side] - way(side) == {branch}]
        if len(ways) < 2:
            continue
        mmas, products = ([count(way, name) for way in ways] for name in (mma, "HMUL2"))
        if all(mmas) or (not any(mmas) and all(products)):
            lengths = [sum(len(blocks[block]) for block in way) for way in ways]
            dearer = max(ways, key=lambda way: lengths[ways.index(way)] / max(mmas[ways.index(way)], 1))
            return _usual_way(body - dearer, blocks, mma)
    return body


def find_main_loop(kernel: Sequence[Instruction], mma: str, *, variants: bool = False) -> tuple[MainLoop | None, int]:
    """The innermost loop around this kernel's MMAs (opcode `mma`), and how many MMAs are outside of every loop.

    Of several such loops the one with most instructions per MMA; None when no loop has an MMA. `variants`: of a kernel
    that has a loop for every number of rows that it tells apart, around all of which is one that reads global memory,
    and in each loop second ways for what is seldom: the loop for most rows, which has most instructions, with the
    cheaper of each two ways.
    """
    if not any(instruction.is_a(mma) for instruction in kernel):
        return None, 0
    blocks = basic_blocks(kernel)
    loops = sorted(_loops(successors(blocks)), key=len)
    innermost: list[set[int]] = []
    outside = 0
    for index, block in enumerate(blocks):
        count = sum(instruction.is_a(mma) for instruction in block)
        around = next((loop for loop in loops if index in loop), None)
        if count and around is None:
            outside += count
        elif count and around is not None and around not in innermost:
            innermost.append(around)
    found = []
    for loop in innermost:
        loop = _usual_way(loop, blocks, mma) if variants else loop
        body = [instruction for index in sorted(loop) for instruction in blocks[index]]
        loads = [instruction for instruction in body if instruction.is_a("LDSM")]
        words = [_words(instruction) for instruction in body if instruction.is_a("LDS")]
        found.append(
            MainLoop(
                instructions=len(body),
                nops=sum(instruction.is_a("NOP") for instruction in body),
                mma=sum(instruction.is_a(mma) for instruction in body),
                ldsm=len(loads),
                ldsm_matrices=sum(map(_matrices, loads)),
                lds=(words.count(1), words.count(2), words.count(4)),
                ldg=sum(instruction.is_a("LDG") for instruction in body),
            )
        )
    if variants:
        return max((loop for loop in found if not loop.ldg), key=lambda loop: loop.instructions, default=None), outside
    return max(found, key=lambda loop: loop.instructions / loop.mma, default=None), outside
