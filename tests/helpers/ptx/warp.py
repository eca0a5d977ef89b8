"""A warp: 32 lanes in groups that are at the same instruction, and what instructions do beyond their registers.

Translated code (translate.py) calls the methods here. Lanes diverge into groups at a branch whose predicate differs,
and are one group again when they come to the same instruction, or at an instruction that needs them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import exchange
from .barriers import MBarrier, Meeting, lanes_of
from .faults import Fault, Kind
from .memory import SHARED_BASE
from .tensor_copy import Copy
from .translate import WAITING
from .wgmma import Groups

if TYPE_CHECKING:
    from .machine import Block

Bools = NDArray[np.bool_]
Mask = Any  # Bools of 32 lanes, or None for all
ALL_LANES = np.ones(32, np.bool_)


class Group:
    """Lanes of a warp at the same instruction."""

    __slots__ = ("at", "mask", "ready", "resume", "together_at")

    def __init__(self, at: int, mask: Mask) -> None:
        self.at, self.mask = at, mask
        self.ready: Callable[[], bool] | None = None  # None: it can go on
        self.resume: Callable[[], int] | None = None  # what it does when ready; returns where it goes on
        self.together_at = -1  # the instruction at which it waits for other lanes

    def wait(self, ready: Callable[[], bool], resume: Callable[[], int]) -> int:
        self.ready, self.resume = ready, resume
        return WAITING

    def lanes(self) -> Bools:
        return ALL_LANES if self.mask is None else self.mask


class Warp:
    def __init__(self, block: Block, number: int, registers: int) -> None:
        self.block, self.number = block, number
        self.index = block.rank * block.warps_per_block + number  # in the domain
        self.clocks = block.domain.clocks
        threads = self.index * 32 + np.arange(32)
        self.numbers = (block.domain.number * self.clocks.threads + threads).astype(np.int32)  # in the grid
        self.special = block.special(number)
        self.R: list[Any] = block.launched.garbage(registers)
        self.groups = [Group(0, None)]
        self.alive = ALL_LANES.copy()
        self.waited = np.zeros(32, np.bool_)  # whether a lane has passed griddepcontrol.wait
        self.at = 0
        self.mmas = block.launched.mmas
        self.wgmmas = Groups()
        self.registers: int | None = None  # what setmaxnreg made of them

    # --- control -----------------------------------------------------------------------------------------------

    def place(self, at: int) -> str:
        instruction = self.block.launched.program.instructions[at]
        return f"block {self.block.number}, warp {self.number}, {instruction.place}"

    def split(self, group: Group, taken: Bools, target: int, other: int) -> int:
        rest = group.lanes() & ~taken
        self.groups.append(Group(target, taken.copy()))
        group.mask = rest
        return self.arrive(group, other)

    def arrive(self, group: Group, at: int) -> int:
        """A group comes to an instruction; takes in the lanes that stand there."""
        group.at = at
        for other in self.groups:
            if other is not group and other.at == at and other.ready is None:
                self._take_in(group, other)
                break
        return at

    def _take_in(self, group: Group, other: Group) -> None:
        mask = group.lanes() | other.lanes()
        group.mask = None if mask.all() else mask
        self.groups = [g for g in self.groups if g is not other]

    def exit(self, group: Group) -> int:
        self.alive &= ~group.lanes()
        self.groups.remove(group)
        if not self.groups:
            self.block.warp_ended()
        return WAITING

    def converge(self, group: Group, at: int, members: Any) -> int | None:
        """Waits until all `members` (a word per lane; None: all 32) are here. None: they are."""
        here = group.lanes()
        needed = ALL_LANES if members is None else self._members(members, here)
        if not (needed & ~here).any():
            return None
        group.together_at = at

        def others() -> list[Group]:
            return [g for g in self.groups if g.together_at == at]

        def ready() -> bool:
            if (needed & ~self.alive).any():
                raise Fault(Kind.CONVERGENCE, f"lanes {np.flatnonzero(needed & ~self.alive).tolist()} have exited")
            present = np.zeros(32, np.bool_)
            for other in others():
                present |= other.lanes()
            return not (needed & ~present).any()

        def resume() -> int:
            for other in others():
                if other is not group:
                    self._take_in(group, other)
            group.together_at = -1
            return at

        return group.wait(ready, resume)

    def _members(self, words: Any, here: Bools) -> Bools:
        named = words[np.flatnonzero(here)]
        if (named != named[0]).any():
            raise Fault(Kind.CONVERGENCE, "lanes name different members")
        members = (int(named[0]) >> np.arange(32) & 1).astype(np.bool_)
        if (here & ~members).any():
            raise Fault(Kind.CONVERGENCE, f"member mask {int(named[0]):#x} leaves out lanes that execute it")
        return members

    def check_members(self, words: Any) -> None:
        self._members(words, ALL_LANES)

    # --- order -------------------------------------------------------------------------------------------------

    def epochs(self, lanes: Any) -> Any:
        return self.clocks.own[self.index * 32 + lanes]

    def meet(self, mask: Mask) -> None:
        self.clocks.meet(self.index, mask)

    def fence_async(self, mask: Mask) -> None:
        self.clocks.fence_async(self.index, mask)

    def fence_mbarrier_init(self, mask: Mask) -> None:
        threads = self.index * 32 + lanes_of(mask)
        for barrier in self.block.mbarriers.values():
            if barrier.inited_by in threads:
                barrier.fenced = True

    # --- memory ------------------------------------------------------------------------------------------------

    def load(self, space: str, mode: str, mask: Mask, addresses: Any, size: int, count: int) -> Any:
        """[count, 32] unsigned integers of `size` bytes; zeros for lanes that do not take part."""
        lanes = lanes_of(mask)
        addresses = addresses[lanes]
        block = self.block
        if space == "generic":
            space, block, addresses = self.block.resolve(addresses)
        if space == "param":
            data = block.launched.read_params(addresses, size * count, size * count)
        elif space == "shared":
            at = block.shared.places(addresses, size * count, "read")
            data = block.shared.load(self, lanes, at).view(np.uint8)
        else:
            data = block.launched.memory.load(self, lanes, addresses, size * count, mode)
        values = np.ascontiguousarray(data).view(f"u{size}").T
        if mask is None:
            return values
        out = np.zeros((count, 32), values.dtype)
        out[:, lanes] = values
        return out

    def store(self, space: str, mask: Mask, addresses: Any, values: tuple[Any, ...]) -> None:
        lanes = lanes_of(mask)
        addresses = addresses[lanes]
        data = np.ascontiguousarray(np.stack(values, 1)[lanes]).view(np.uint8)
        block = self.block
        if space == "generic":
            space, block, addresses = self.block.resolve(addresses)
        if space == "shared":
            at = block.shared.places(addresses, data.shape[1], "write")
            block.shared.store(self, lanes, at, data.view(np.uint32))
        else:
            block.launched.memory.store(self, lanes, addresses, data)

    def prefetch(self, mask: Mask, addresses: Any) -> None:
        """Changes nothing; but a line that is no array's is a mistake."""
        for address in addresses[lanes_of(mask)].tolist():
            self.block.launched.memory.find(address, address + 1, "prefetch")

    def generic(self, addresses: Any) -> Any:
        return addresses + np.uint64(self.block.window)

    def map_shared(self, mask: Mask, addresses: Any, ranks: Any) -> Any:
        lanes = lanes_of(mask)
        out = np.zeros(32, np.uint64)
        out[lanes] = self.block.map_shared(addresses[lanes], ranks[lanes])
        return out

    # --- exchange ----------------------------------------------------------------------------------------------

    def shuffle(self, kind: str, mask: Mask, value: Any, by: Any, clamp: Any) -> tuple[Any, Any]:
        values, inside, source = exchange.shuffle(kind, value, by, clamp)
        if mask is not None and not mask[source[mask]].all():
            raise Fault(Kind.CONVERGENCE, "shfl.sync from a lane that does not take part")
        return values, inside

    def elect(self, mask: Mask) -> tuple[Any, Any]:
        leader = int(lanes_of(mask)[0])
        return np.full(32, leader, np.uint32), np.arange(32) == leader

    def reduce(self, function: Any, mask: Mask, value: Any) -> Any:
        return np.full(32, function.reduce(value[lanes_of(mask)]), np.uint32)

    def any(self, mask: Mask, value: Any) -> Any:
        return np.full(32, value[lanes_of(mask)].any())

    def all(self, mask: Mask, value: Any) -> Any:
        return np.full(32, value[lanes_of(mask)].all())

    def match_any(self, mask: Mask, value: Any) -> Any:
        return exchange.match_any(value, lanes_of(mask))

    def load_matrices(self, addresses: Any, count: int) -> Any:
        rows = addresses[: 8 * count]
        self.block.shared.places(rows, 16, "ldmatrix")
        at = self.block.shared.places(exchange.matrix_rows(addresses, count).reshape(-1), 4, "ldmatrix")
        return np.ascontiguousarray(self.block.shared.load(self, lanes_of(None), at.reshape(32, count)).T)

    def transpose(self, value: Any) -> Any:
        return exchange.transpose_matrix(value)

    def set_registers(self, more: bool, count: int) -> None:
        if count % 8 or not 24 <= count <= 256:
            raise Fault(Kind.REGISTERS, f"setmaxnreg {count}: expected a multiple of 8 from 24 to 256")
        self.registers = count

    # --- barriers ----------------------------------------------------------------------------------------------

    def _mbarrier(self, address: int) -> MBarrier:
        barrier = self.block.mbarriers.get(address - SHARED_BASE)
        if barrier is None:
            raise Fault(Kind.BARRIER, f"no mbarrier was initialized at byte {address - SHARED_BASE} of shared memory")
        return barrier

    def mbarrier_init(self, mask: Mask, addresses: Any, counts: Any) -> None:
        for lane in lanes_of(mask).tolist():
            self.block.init_mbarrier(self, lane, int(addresses[lane]), int(counts[lane]))

    def mbarrier_arrive(self, mask: Mask, addresses: Any, expected: Any = None) -> None:
        for lane in lanes_of(mask).tolist():
            barrier = self._mbarrier(int(addresses[lane]))
            one = np.arange(32) == lane
            knowledge = self.clocks.release(self.index, one)
            barrier.check_inited(knowledge, False)
            if expected is not None:
                barrier.expect(int(expected[lane]))
            barrier.arrive(knowledge)

    def try_wait(self, group: Group, target: int, addresses: Any, parities: Any) -> int:
        """True for lanes whose phase is complete. If that is none, false at times, as the ISA allows, or it waits."""
        at, lanes = group.at, lanes_of(group.mask)
        barriers = [self._mbarrier(address) for address in addresses[lanes].tolist()]
        done = np.array([b.is_complete(int(parities[lane])) for b, lane in zip(barriers, lanes, strict=True)])
        for barrier, lane in zip(barriers, lanes.tolist(), strict=True):
            if barrier is not barriers[0] or lane == lanes[0]:
                barrier.check_inited(self.clocks.knowledge(self.index, lane), False)
        if not done.any() and self.block.launched.rng.random() < 0.75:

            def ready() -> bool:
                return any(b.is_complete(int(parities[lane])) for b, lane in zip(barriers, lanes, strict=True))

            return group.wait(ready, lambda: at)
        result = np.zeros(32, np.bool_)
        result[lanes] = done
        self.R[target] = result if group.mask is None else np.where(group.mask, result, self.R[target])
        same = all(b is barriers[0] for b in barriers)
        if same and done.all():
            if barriers[0].done is not None:  # the phase before the first is over from the start
                self.clocks.acquire(self.index, group.mask, barriers[0].done)
        else:
            for barrier, lane in zip(barriers, lanes.tolist(), strict=True):
                if result[lane] and barrier.done is not None:
                    self.clocks.acquire(self.index, np.arange(32) == lane, barrier.done)
        return at + 1

    def _join(self, group: Group, meeting: Meeting, then: Callable[[], None]) -> int:
        at, mask = group.at, group.mask

        def resume() -> int:
            assert meeting.given is not None
            self.clocks.acquire(self.index, mask, meeting.given)
            then()
            return at + 1

        return group.wait(lambda: meeting.done, resume)

    def barrier(self, group: Group, number: int, counts: Any, predicate: Any, target: int | None) -> int:
        """bar.sync and bar.red.popc: all lanes of the warp, and all warps of the block or as many threads as named."""
        together = self.converge(group, group.at, None)
        if together is not None:
            return together
        needed = self.block.threads if counts is None else int(counts[0])
        if needed % 32 or not 0 < needed <= self.block.threads:
            raise Fault(Kind.BARRIER, f"bar.sync {number} of {needed} threads in a block of {self.block.threads}")
        value = 0 if predicate is None else int(predicate.sum())
        name = f"bar.sync {number}"
        knowledge = self.clocks.release(self.index, None)
        meeting = self.block.rounds(number).join(needed, 32, knowledge, value, name)

        def then() -> None:
            if target is not None:
                self.R[target] = np.full(32, meeting.value, np.uint32)

        return self._join(group, meeting, then)

    def cluster_arrive(self, group: Group) -> int:
        lanes = group.lanes()
        knowledge = self.clocks.release(self.index, group.mask)
        self.block.domain.cluster_arrive(self.index, lanes, knowledge)
        return group.at + 1

    def cluster_wait(self, group: Group) -> int:
        meeting = self.block.domain.cluster_meeting(self.index, group.lanes())
        return self._join(group, meeting, lambda: None)

    # --- the async proxy and other grids -------------------------------------------------------------------------

    def copy(self, mask: Mask, to: Any, maps: Any, x: Any, y: Any, barriers: Any) -> None:
        launched = self.block.launched
        for lane in lanes_of(mask).tolist():
            barrier = self._mbarrier(int(barriers[lane]))
            known = self.clocks.knowledge(self.index, lane)
            barrier.check_inited(known, True)
            copy = Copy(
                self.block,
                launched.tensor_map(int(maps[lane])),
                int(to[lane]),
                (int(x[lane]), int(y[lane])),
                barrier,
                known,
                bool(self.waited[lane]),
                self.place(self.at),
            )
            copy.check()
            launched.in_flight.append(copy)

    def grid_wait(self, group: Group) -> int:
        self.waited |= group.lanes()
        self.block.launched.somebody_waited = True
        return group.at + 1

    def launch_dependents(self, mask: Mask) -> None:
        if not self.waited[lanes_of(mask)].all():
            self.block.triggered_early = True
