"""A model of a stream whose kernels start early (programmatic dependent launch): every order of events, and its faults.

Semantics are those of the PTX ISA (griddepcontrol) and the CUDA programming guide, read so that they promise least:

- An early kernel's block may start once every block of the kernel just before has let it, or has ended. One warp lets
  for its block. Other kernels start when the one just before is complete.
- A kernel is complete some time after all of its warps have ended; what it writes can be seen then, and not before.
- `wait` returns when the kernel just before is complete. It says nothing of the kernels before that one, but what
  follows from their own waits.

A kernel is blocks of warps of operations. `search` visits every state and returns the first access that is not safe:
one of memory that an earlier kernel writes and that is not complete, or a write of memory that an earlier kernel has
yet to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

WAIT, TRIGGER, READ, WRITE, AFTER = "wait", "let the next start", "read", "write", "after"
Op = tuple[str, str]  # what, and where; AFTER: until the block's first warp has ended
Warp = tuple[Op, ...]
Aliases = Callable[[str, str], bool]

wait: Op = (WAIT, "")
trigger: Op = (TRIGGER, "")
after: Op = (AFTER, "")


def read(where: str) -> Op:
    return (READ, where)


def write(where: str) -> Op:
    return (WRITE, where)


@dataclass(frozen=True)
class Kernel:
    name: str
    blocks: tuple[tuple[Warp, ...], ...]
    early: bool = True


def kernel(name: str, *warps: Warp, early: bool = True, blocks: int = 2) -> Kernel:
    """A grid of equal blocks."""
    return Kernel(name, (warps,) * blocks, early)


@dataclass(frozen=True)
class Found:
    """`fault`: kernel and access that are not safe, and what they meet; "" where every order is safe."""

    fault: str
    states: int


class _Stream:
    """The kernels, with each warp at a place of a flat state: -1 not started, else the next operation.

    Behind the warps stands whether each kernel is complete.
    """

    def __init__(self, kernels: Sequence[Kernel], aliases: Aliases) -> None:
        self.kernels = tuple(kernels)
        self.places: list[list[list[int]]] = []
        self.warps: list[tuple[int, int, int]] = []
        for k, kernel in enumerate(self.kernels):
            blocks = []
            for b, block in enumerate(kernel.blocks):
                blocks.append(list(range(len(self.warps), len(self.warps) + len(block))))
                self.warps += [(k, b, w) for w in range(len(block))]
            self.places.append(blocks)
        self.ops = [self.kernels[k].blocks[b][w] for k, b, w in self.warps]
        self.meets = {
            (k, op): [
                (i, p, at, what)
                for p, (i, _, _) in enumerate(self.warps)
                if i < k
                for at, (what, where) in enumerate(self.ops[p])
                if WRITE in (op[0], what) and what in (READ, WRITE) and aliases(op[1], where)
            ]
            for k, kernel in enumerate(self.kernels)
            for block in kernel.blocks
            for warp in block
            for op in warp
            if op[0] in (READ, WRITE)
        }

    def complete(self, state: tuple[int, ...], k: int) -> bool:
        return state[len(self.warps) + k] == 1

    def has_ended(self, state: tuple[int, ...], k: int) -> bool:
        return all(state[p] == len(self.ops[p]) for block in self.places[k] for p in block)

    def lets(self, state: tuple[int, ...], k: int) -> bool:
        """Whether every block of a kernel has let the next one start, or has ended."""
        for block in self.places[k]:
            if all(state[p] == len(self.ops[p]) for p in block):
                continue
            if not any(trigger in self.ops[p][: max(state[p], 0)] for p in block):
                return False
        return True

    def may_start(self, state: tuple[int, ...], k: int) -> bool:
        if k == 0:
            return True
        return self.lets(state, k - 1) if self.kernels[k].early else self.complete(state, k - 1)

    def may_go_on(self, state: tuple[int, ...], p: int) -> bool:
        k, b, _ = self.warps[p]
        what = self.ops[p][state[p]][0]
        if what == WAIT:
            return k == 0 or self.complete(state, k - 1)
        first = self.places[k][b][0]
        return what != AFTER or state[first] == len(self.ops[first])

    def fault(self, state: tuple[int, ...], p: int) -> str:
        k, op = self.warps[p][0], self.ops[p][state[p]]
        for i, other, at, what in self.meets.get((k, op), ()):
            safe = state[other] > at if what == READ else self.complete(state, i)
            if not safe:
                return f"{self.kernels[k].name}: {op[0]} {op[1]}, which {self.kernels[i].name} has yet to {what}"
        return ""


def search(kernels: Sequence[Kernel], aliases: Aliases = str.__eq__) -> Found:
    """Every state that the kernels, launched one after the other, can come to.

    Args:
        aliases: whether two names may be the same memory.
    """
    stream = _Stream(kernels, aliases)
    start = (-1,) * len(stream.warps) + (0,) * len(stream.kernels)
    seen, left = {start}, [start]
    while left:
        state = left.pop()
        nexts = []
        for k, blocks in enumerate(stream.places):
            if not stream.complete(state, k) and stream.has_ended(state, k):
                nexts.append({len(stream.warps) + k: 1})
            for block in blocks:
                if state[block[0]] < 0:
                    if stream.may_start(state, k):
                        nexts.append(dict.fromkeys(block, 0))
                    continue
                for p in block:
                    if state[p] == len(stream.ops[p]) or not stream.may_go_on(state, p):
                        continue
                    if fault := stream.fault(state, p):
                        return Found(fault, len(seen))
                    nexts.append({p: state[p] + 1})
        for change in nexts:
            found = tuple(change.get(p, at) for p, at in enumerate(state))
            if found not in seen:
                seen.add(found)
                left.append(found)
        if not nexts and not all(stream.complete(state, k) for k in range(len(stream.kernels))):
            return Found("nothing can go on", len(seen))
    return Found("", len(seen))
