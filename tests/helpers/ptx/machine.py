"""The executor: launches, one after the other, of blocks whose warps run in random order.

A launch's blocks, or clusters of them, are resident a few at a time; each step lets a random group of lanes go on for a
random while, or a tensor copy land. Everything random comes from the machine's seed. Kernels run one after the other,
but what an earlier one wrote counts as not there yet until griddepcontrol.wait, if it was launched so that it may still
run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .barriers import MBarrier, Meeting, Rounds
from .faults import Fault, Kind
from .launch import Launch
from .memory import SHARED_BASE, Memory, SharedMemory
from .mma import Queue
from .order import MBARRIERS, Clocks
from .parse import Kernel, parse
from .tensor_copy import Copy, TensorMap
from .translate import Program
from .warp import Group, Warp

PARAM_BASE = 1 << 57  # of a kernel's parameters, as generic addresses
WINDOW = 1 << 56  # of shared memory, as generic addresses; a block's rank in its cluster from bit 40 on
REGISTERS_PER_BLOCK = 65536


@functools.lru_cache(maxsize=64)
def programs(ptx: str) -> dict[str, Program]:
    """The kernels of a PTX file, ready to be translated; by name."""
    return {name: Program(kernel) for name, kernel in parse(ptx).items()}


@dataclass
class Domain:
    """The blocks that barriers can order: a cluster, or a single block."""

    number: int
    clocks: Clocks
    threads: int
    blocks: list[Block] = field(default_factory=list)
    meeting: Meeting | None = None
    arrived: dict[int, Meeting] = field(default_factory=dict)  # thread -> the round in which it arrived

    def cluster_arrive(self, warp: int, lanes: NDArray[np.bool_], knowledge: Any) -> None:
        if self.meeting is None:
            self.meeting = Meeting(self.threads)
        for lane in np.flatnonzero(lanes).tolist():
            if warp * 32 + lane in self.arrived:
                raise Fault(Kind.BARRIER, "barrier.cluster.arrive twice without a wait")
            self.arrived[warp * 32 + lane] = self.meeting
        self.meeting.arrive(int(lanes.sum()), knowledge)
        if self.meeting.done:
            self.meeting = None

    def cluster_meeting(self, warp: int, lanes: NDArray[np.bool_]) -> Meeting:
        found = [self.arrived.pop(warp * 32 + lane, None) for lane in np.flatnonzero(lanes).tolist()]
        if found[0] is None or any(meeting is not found[0] for meeting in found):
            raise Fault(Kind.BARRIER, "barrier.cluster.wait without arrive")
        return found[0]


@dataclass(frozen=True)
class Finished:
    """A kernel that was executed, as far as the next one may see it still running."""

    index: int
    running: tuple[int, ...] = ()  # that might still have run when this one started
    waited: bool = True  # whether any of its threads waited for them: then they were complete before it was
    triggered_late: bool = True  # whether each block let the next kernel start, or ended, only after it had waited


class Block:
    def __init__(self, launched: Launched, number: int, domain: Domain, rank: int) -> None:
        launch = launched.launch
        self.launched, self.number, self.domain, self.rank = launched, number, domain, rank
        self.threads = int(np.prod(launch.block))
        self.warps_per_block = self.threads // 32
        self.shared = SharedMemory(launched.shared_bytes, domain.clocks, launched.junk, launched.rng)
        self.window = WINDOW + (rank << 40)
        self.mbarriers: dict[int, MBarrier] = {}
        self._rounds: dict[int, Rounds] = {}
        self.triggered_early = False  # griddepcontrol.launch_dependents by a thread that had not waited
        registers = len(launched.program.numbers)
        self.warps = [Warp(self, w, registers) for w in range(self.warps_per_block)]
        self.running = len(self.warps)

    def special(self, warp: int) -> dict[str, NDArray[np.uint32]]:
        launch = self.launched.launch
        thread = warp * 32 + np.arange(32, dtype=np.uint32)
        found = {"%laneid": np.arange(32, dtype=np.uint32)}
        width, height, _ = launch.block
        for axis, ids in zip(
            "xyz", (thread % width, thread // width % height, thread // (width * height)), strict=True
        ):
            found[f"%tid.{axis}"] = ids.astype(np.uint32)
        columns, rows, _ = launch.grid
        at = (self.number % columns, self.number // columns % rows, self.number // (columns * rows))
        values = {"ctaid": at, "ntid": launch.block, "nctaid": launch.grid}
        for name, triple in values.items():
            for axis, value in zip("xyz", triple, strict=True):
                found[f"%{name}.{axis}"] = np.full(32, value, np.uint32)
        found["%cluster_ctarank"] = np.full(32, self.rank, np.uint32)
        found["%cluster_nctarank"] = np.full(32, len(self.domain.blocks) or 1, np.uint32)
        return found

    def triggered_late(self) -> bool:
        return not self.triggered_early and any(warp.waited.any() for warp in self.warps)

    def rounds(self, number: int) -> Rounds:
        return self._rounds.setdefault(number, Rounds())

    def init_mbarrier(self, warp: Warp, lane: int, address: int, count: int) -> None:
        offset = address - SHARED_BASE
        at = self.shared.places(np.array([address], np.int64), 8, "mbarrier.init")
        if offset in self.mbarriers:
            raise Fault(Kind.BARRIER, f"the mbarrier at byte {offset} was initialized before")
        if not 1 <= count < 1 << 20:
            raise Fault(Kind.BARRIER, f"mbarrier.init with {count} arrivals")
        self.shared.store(warp, np.array([lane]), at, np.zeros((1, 2), np.uint32))
        slot = self.domain.clocks.threads + self.rank * MBARRIERS + len(self.mbarriers)
        if len(self.mbarriers) == MBARRIERS:
            raise Fault(Kind.UNKNOWN, f"more than {MBARRIERS} mbarriers in a block")
        thread = warp.index * 32 + lane
        epoch = int(self.domain.clocks.own[thread])
        self.mbarriers[offset] = MBarrier(offset, count, slot, thread, epoch)
        self.shared.make_mbarrier(offset)

    def resolve(self, addresses: NDArray[np.int64]) -> tuple[str, Block, NDArray[np.int64]]:
        """Generic addresses: their space, whose shared memory, and their addresses there."""
        first = int(addresses[0])
        if first >= PARAM_BASE:
            return "param", self, addresses
        if first < WINDOW:
            return "global", self, addresses
        ranks = addresses - WINDOW >> 40
        if (ranks != ranks[0]).any() or not 0 <= int(ranks[0]) < len(self.domain.blocks):
            raise Fault(Kind.BOUNDS, f"generic address {first:#x}: no block of the cluster, or of several")
        block = self.domain.blocks[int(ranks[0])]
        if not block.running:
            raise Fault(Kind.BOUNDS, f"shared memory of block {block.number}, which has ended")
        return "shared", block, addresses - block.window

    def map_shared(self, addresses: NDArray[np.uint64], ranks: NDArray[np.uint32]) -> NDArray[np.uint64]:
        if (ranks >= len(self.domain.blocks)).any():
            raise Fault(Kind.BOUNDS, f"mapa to rank {int(ranks.max())} of a cluster of {len(self.domain.blocks)}")
        inside = addresses - np.uint64(self.window)
        return inside + np.uint64(WINDOW) + (ranks.astype(np.uint64) << np.uint64(40))

    def warp_ended(self) -> None:
        self.running -= 1
        if self.running:
            return
        if any(copy.block is self for copy in self.launched.in_flight):
            raise Fault(Kind.COPY, f"block {self.number} exits with tensor copies in flight")
        for barrier in self.mbarriers.values():
            if barrier.bytes:
                raise Fault(
                    Kind.BARRIER,
                    f"block {self.number} exits, its mbarrier at byte {barrier.at} still counts {barrier.bytes} bytes",
                )
        settings = [warp.registers for warp in self.warps]
        if any(settings):
            if not all(settings):
                raise Fault(Kind.REGISTERS, "setmaxnreg in some warps of the block only")
            if 32 * sum(r or 0 for r in settings) > REGISTERS_PER_BLOCK:
                raise Fault(Kind.REGISTERS, f"setmaxnreg: {32 * sum(r or 0 for r in settings)} registers in a block")


class Launched:
    """One launch while it runs."""

    def __init__(
        self, machine: Machine, launch: Launch, program: Program, before: Finished | None, junk: Sequence[range]
    ) -> None:
        self.launch, self.program, self.rng, self.junk = launch, program, machine.rng, junk
        self.index = machine.kernels
        self.memory = machine.memory
        self.mmas = machine.mmas
        # Kernels before this one that may still run: at its start, and even after griddepcontrol.wait.
        self.running: tuple[int, ...] = ()
        self.running_after_wait: tuple[int, ...] = ()
        if before is not None:
            self.running = (before.index, *(() if before.triggered_late else before.running))
            self.running_after_wait = () if before.waited else before.running
        self.somebody_waited = False
        self.in_flight: list[Copy] = []
        self.shared_bytes = self._place(program.kernel, launch)
        self._junk = machine.rng.integers(0, 1 << 32, (64, 32), np.uint32)

    def _place(self, kernel: Kernel, launch: Launch) -> int:
        """Gives shared variables and parameters their addresses; returns the bytes of shared memory."""
        at = SHARED_BASE
        symbols = self.program.symbols
        for name, alignment, size in kernel.shared:
            if is_used(name, kernel):
                at = -(-at // alignment) * alignment
                symbols[name] = at
                at += size
        if kernel.dynamic_shared is not None:
            name, alignment = kernel.dynamic_shared
            at = -(-at // alignment) * alignment
            symbols[name] = at
        at += launch.smem_bytes
        address, data = PARAM_BASE, bytearray()
        if len(launch.params) != len(kernel.params):
            raise ValueError(f"{kernel.name}: expected {len(kernel.params)} parameters, got {len(launch.params)}")
        for (name, alignment, size), value in zip(kernel.params, launch.params, strict=True):
            if len(value) != size:
                raise ValueError(f"{name}: expected {size} bytes, got {len(value)}")
            data.extend(bytes(-len(data) % alignment))
            symbols[name] = address + len(data)
            data.extend(value)
        self.params = np.frombuffer(bytes(data), np.uint8)
        return at - SHARED_BASE

    def garbage(self, count: int) -> list[NDArray[Any]]:
        """What registers hold before anything is written to them."""
        kinds = {
            "pred": np.bool_,
            "b8": np.uint8,
            "b16": np.uint16,
            "f16": np.uint16,
            "b32": np.uint32,
            "f32": np.float32,
            "b64": np.uint64,
        }
        junk = [self._junk[i % 64] for i in range(8)]
        cast = {name: [(j & 1).astype(t) if t is np.bool_ else j.astype(t) for j in junk] for name, t in kinds.items()}
        type_of = self.program.kernel.type_of
        return [cast[type_of(name)][i % 8] for i, name in enumerate(self.program.numbers)]

    def read_params(self, addresses: NDArray[np.int64], size: int, alignment: int) -> NDArray[np.uint8]:
        if (addresses & (alignment - 1)).any():
            raise Fault(Kind.ALIGNMENT, f"{size} bytes of the parameters at byte {int(addresses[0]) - PARAM_BASE}")
        offsets = addresses - PARAM_BASE
        if int(offsets.min()) < 0 or int(offsets.max()) + size > len(self.params):
            raise Fault(Kind.BOUNDS, f"ld.param at byte {int(offsets.max())} of {len(self.params)}")
        return self.params[offsets[:, None] + np.arange(size)]

    def tensor_map(self, address: int) -> TensorMap:
        return TensorMap.decode(self.read_params(np.array([address], np.int64), 128, 64).tobytes())

    def check_complete(self, warp: Warp, lanes: Any, kernels: NDArray[np.int16], name: str) -> None:
        """Whether the kernels that wrote something, [lanes, bytes], are complete for the lanes that read it."""
        early = kernels[~warp.waited[lanes]]
        if np.isin(early, self.running).any():
            raise Fault(Kind.EARLY, f"read of {name}, which the kernel before writes")
        if np.isin(kernels, self.running_after_wait).any():
            raise Fault(
                Kind.EARLY, f"read of {name}: its writer may still run, because the kernel between did not wait"
            )

    def check_may_write(self, warp: Warp, lanes: Any, name: str) -> None:
        if self.running and (self.running_after_wait or not warp.waited[lanes].all()):
            raise Fault(Kind.EARLY, f"write to {name}, while a kernel before may still read or write it")


class Machine:
    """Memory and a stream of kernels.

    resident: how many blocks, or clusters, run at the same time. lateness: how much rarer a copy lands than a group of
    lanes goes on.
    """

    def __init__(self, *, seed: int = 0, resident: int = 4, lateness: float | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.memory = Memory()
        self.mmas = Queue()
        self.kernels = 0
        self.resident = resident
        self.lateness = lateness if lateness is not None else float(self.rng.choice([0.5, 3.0, 20.0, 200.0]))
        self._last: Finished | None = None

    def pretend_kernel(self, writes: Sequence[str]) -> None:
        """A kernel that wrote these arrays, and may still run when the next one starts."""
        for name in writes:
            self.memory[name].kernel.fill(self.kernels)
        self._last = Finished(self.kernels)
        self.kernels += 1

    def run(self, ptx: str, launch: Launch, *, junk: Sequence[range] = ()) -> None:
        """Executes a launch; Fault if it makes a mistake.

        junk: bytes of each block's shared memory that the kernel may read although nobody wrote them.
        """
        program = programs(ptx)[launch.kernel]
        launched = Launched(self, launch, program, self._last if launch.programmatic else None, junk)
        self.memory.begin_kernel()
        blocks = int(np.prod(launch.grid))
        cluster = int(np.prod(launch.cluster))
        threads = int(np.prod(launch.block))
        if threads % 32 or blocks % cluster:
            raise ValueError(f"expected whole warps and clusters, got {launch}")
        waiting = list(range(blocks // cluster))
        self.rng.shuffle(waiting)
        domains: list[Domain] = []
        triggered_late = True
        with np.errstate(all="ignore"):
            while waiting or domains:
                while waiting and len(domains) < self.resident:
                    domains.append(self._domain(launched, waiting.pop(), cluster, threads))
                self._step(launched, domains)
                for domain in [d for d in domains if not any(block.running for block in d.blocks)]:
                    domains.remove(domain)
                    triggered_late &= all(block.triggered_late() for block in domain.blocks)
        if launched.in_flight:
            raise Fault(Kind.COPY, "the kernel ends with tensor copies in flight")
        self.mmas.flush()
        self._last = Finished(self.kernels, launched.running, launched.somebody_waited, triggered_late)
        self.kernels += 1

    def _domain(self, launched: Launched, number: int, cluster: int, threads: int) -> Domain:
        clocks = Clocks(cluster * threads, cluster * MBARRIERS)
        domain = Domain(number, clocks, cluster * threads)
        for rank in range(cluster):
            domain.blocks.append(Block(launched, number * cluster + rank, domain, rank))
        return domain

    def _step(self, launched: Launched, domains: list[Domain]) -> None:
        """Lets one group of lanes go on, or one copy land."""
        choices: list[tuple[Warp, Group]] = []
        for domain in domains:
            for block in domain.blocks:
                for warp in block.warps:
                    able = [g for g in warp.groups if self._able(warp, g)]
                    if able:
                        # Mostly those behind, so that lanes come together again.
                        behind = len(able) == 1 or self.rng.random() < 0.9
                        one = min(able, key=lambda g: g.at) if behind else able[int(self.rng.integers(len(able)))]
                        choices.append((warp, one))
        copies = launched.in_flight
        if copies and (not choices or self.rng.random() < 1 / (1 + self.lateness)):
            copy = copies.pop(int(self.rng.integers(len(copies))))
            try:
                copy.land()
            except Fault as fault:
                fault.place = fault.place or copy.place
                raise
            return
        if not choices:
            raise Fault(Kind.HANG, "nothing can go on:\n" + "\n".join(_places(domains)))
        warp, group = choices[int(self.rng.integers(len(choices)))]
        try:
            self._go_on(launched.program, warp, group)
        except Fault as fault:
            fault.place = fault.place or warp.place(warp.at)
            raise

    @staticmethod
    def _able(warp: Warp, group: Group) -> bool:
        if group.ready is None:
            return True
        warp.at = group.at
        return group.ready()

    def _go_on(self, program: Program, warp: Warp, group: Group) -> None:
        at = group.at
        if group.ready is not None:
            resume, group.ready, group.resume = group.resume, None, None
            assert resume is not None
            at = warp.arrive(group, resume())
        masked, full = program.units
        for _ in range(int(self.rng.integers(1, 24))):
            if group.mask is None:
                unit = full.get(at) or program.unit(at, True)
            else:
                unit = masked.get(at) or program.unit(at, False)
            at = unit(warp, warp.R, group.mask, group)
            if at < 0:
                return
            group.at = at
            if len(warp.groups) > 1:
                warp.arrive(group, at)


def is_used(name: str, kernel: Kernel) -> bool:
    """Whether a kernel names a shared variable of its file."""
    return any(name in operand for i in kernel.instructions for operand in i.operands)


def _places(domains: list[Domain]) -> list[str]:
    """Where every group of lanes stands."""
    lines = []
    for domain in domains:
        for block in domain.blocks:
            for warp in block.warps:
                for group in warp.groups:
                    lanes = "all lanes" if group.mask is None else f"lanes {np.flatnonzero(group.mask).tolist()}"
                    lines.append(f"  {warp.place(group.at)} ({lanes})")
    return lines
