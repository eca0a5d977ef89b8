"""Which instructions of a kernel may run after which: its basic blocks and where each may go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wheelbuild.machine_code import Instruction

_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
JUMPS = ("BRA", "EXIT", "RET", *_INDIRECT)  # after one of these, if unconditional, the next instruction is not next


def is_any(instruction: Instruction, names: Iterable[str]) -> bool:
    return any(instruction.is_a(name) for name in names)


def basic_blocks(kernel: Sequence[Instruction]) -> list[list[Instruction]]:
    """The kernel cut before every target of a branch and after every jump."""
    targets = {instruction.target for instruction in kernel}
    blocks: list[list[Instruction]] = []
    cut = True
    for instruction in kernel:
        if cut or instruction.address in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        cut = is_any(instruction, JUMPS)
    return blocks


def successors(blocks: Sequence[Sequence[Instruction]]) -> list[set[int]]:
    """Where each block may go. An indirect branch's table is not in the listing: it may go to any block that no other
    block leads to.
    """
    place = {block[0].address: index for index, block in enumerate(blocks)}
    following: list[set[int]] = [set() for _ in blocks]
    for index, block in enumerate(blocks):
        last = block[-1]
        if last.target in place:
            following[index].add(place[last.target])
        if index + 1 < len(blocks) and (last.conditional or not is_any(last, JUMPS)):
            following[index].add(index + 1)
    orphans = set(range(1, len(blocks))) - set().union(*following)
    for index, block in enumerate(blocks):
        if is_any(block[-1], _INDIRECT):
            following[index] |= orphans
    return following


def predecessors(following: Sequence[set[int]]) -> list[list[int]]:
    """From where each block may come, given where each may go."""
    before: list[list[int]] = [[] for _ in following]
    for block, targets in enumerate(following):
        for target in targets:
            before[target].append(block)
    return before
