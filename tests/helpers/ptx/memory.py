"""Memory: global memory as registered numpy arrays, and a block's shared memory.

Both know of every byte (shared memory: every 32-bit word) whether it was ever written, who wrote it last and who read
it since, and refuse an access that is out of bounds, misaligned, of something unwritten, or not ordered after a
conflicting one (order.py). The lanes of an access come as their numbers, with one address each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .faults import Fault, Kind
from .order import FENCED, KNOWN, Clocks

if TYPE_CHECKING:
    from .machine import Launched, Warp

Lanes = NDArray[np.intp]
Addresses = NDArray[np.int64]

SHARED_BASE = 1024  # of a block's shared memory in its own address space: nothing of the kernel's lies below
NOBODY, MANY = -1, -2


@dataclass
class Region:
    """One array that kernels may touch."""

    name: str
    base: int
    bytes: NDArray[np.uint8]
    written: NDArray[np.bool_]
    writable: bool
    keeps_alive: Any = None
    # Per byte, of the kernel that is running: last writer and reader (thread numbers in the grid) and their epochs.
    writer: NDArray[np.int32] = field(init=False)
    write_epoch: NDArray[np.int32] = field(init=False)
    reader: NDArray[np.int32] = field(init=False)
    read_epoch: NDArray[np.int32] = field(init=False)
    # Per byte, number of the kernel that wrote it last.
    kernel: NDArray[np.int16] = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.bytes) if self.writable else 0
        self.kernel = np.full(size, NOBODY, np.int16)
        self.write_epoch, self.read_epoch = (np.zeros(size, np.int32) for _ in range(2))
        self.writer, self.reader = (np.full(size, NOBODY, np.int32) for _ in range(2))

    @property
    def end(self) -> int:
        return self.base + len(self.bytes)


class Memory:
    """Global memory: only what was registered is there."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._bases: list[int] = []

    def add(self, name: str, array: NDArray[Any], *, written: bool | NDArray[np.bool_], writable: bool) -> Region:
        """Registers a contiguous array under its own address.

        written: of each byte, or of all, whether somebody wrote it before the first kernel.
        """
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected a contiguous array, got strides {array.strides} of shape {array.shape}")
        data = array.reshape(-1).view(np.uint8)
        state = np.full(len(data), written) if isinstance(written, (bool, np.bool_)) else written.reshape(-1).copy()
        if len(state) != len(data):
            raise ValueError(f"{name}: expected written for {len(data)} bytes, got {len(state)}")
        region = Region(name, array.ctypes.data, data, state, writable, array)
        for other in self._regions:
            if region.base < other.end and other.base < region.end and len(data) and len(other.bytes):
                raise ValueError(f"{name} overlaps {other.name}")
        at = bisect_right(self._bases, region.base)
        self._regions.insert(at, region)
        self._bases.insert(at, region.base)
        return region

    def __getitem__(self, name: str) -> Region:
        return next(region for region in self._regions if region.name == name)

    def begin_kernel(self) -> None:
        """Forgets the accesses of the kernel before; who wrote last stays known."""
        for region in self._regions:
            if region.writable:
                region.writer.fill(NOBODY)
                region.reader.fill(NOBODY)

    def find(self, low: int, high: int, what: str) -> Region:
        """The region that holds bytes [low, high)."""
        at = bisect_right(self._bases, low) - 1
        if at >= 0 and high <= self._regions[at].end:
            return self._regions[at]
        near = (
            f"; nearest below: {self._regions[at].name}, {self._regions[at].end - low:+d} bytes to its end"
            if at >= 0
            else ""
        )
        raise Fault(Kind.BOUNDS, f"{what} of [{low:#x}, {high:#x}) in no array{near}")

    def _places(self, addresses: Addresses, size: int, what: str) -> tuple[Region, NDArray[np.int64]]:
        """Region and byte offsets [lanes, size]."""
        if (addresses & (size - 1)).any():
            raise Fault(
                Kind.ALIGNMENT, f"{what} of {size} bytes at {int(addresses[(addresses & (size - 1)) != 0][0]):#x}"
            )
        low, high = int(addresses.min()), int(addresses.max()) + size
        try:
            region = self.find(low, high, what)
        except Fault:
            for address in addresses.tolist():  # lanes may be in several arrays; that is rare enough to refuse
                self.find(address, address + size, what)
            raise
        return region, (addresses - region.base)[:, None] + np.arange(size)

    def load(self, warp: Warp, lanes: Lanes, addresses: Addresses, size: int, mode: str) -> NDArray[np.uint8]:
        """[lanes, size] bytes. mode: plain, cg, relaxed, or nc, the read-only path."""
        region, at = self._places(addresses, size, "read")
        if not region.written[at].all():
            lane = int(np.flatnonzero(~region.written[at].all(1))[0])
            raise Fault(Kind.UNWRITTEN, f"{region.name}, byte {int(at[lane, 0])} (lane {int(lanes[lane])})")
        if region.writable:
            self._check_read(warp, lanes, region, at, mode)
        return region.bytes[at]

    def _check_read(self, warp: Warp, lanes: Lanes, region: Region, at: NDArray[np.int64], mode: str) -> None:
        launched = warp.block.launched
        if launched.running:
            kernel = region.kernel[at]
            if mode == "nc" and np.isin(kernel, launched.running).any():
                raise Fault(Kind.STALE, f"ld.global.nc of {region.name}, which the kernel before writes")
            launched.check_complete(warp, lanes, kernel, region.name)
        me = warp.numbers[lanes][:, None]
        self._check_order(warp, lanes, region, at, "writer", "read")
        if mode == "nc" and (region.writer[at] != NOBODY).any():
            raise Fault(Kind.STALE, f"ld.global.nc of {region.name}, which this kernel writes")
        before = region.reader[at]
        region.reader[at] = np.where((before == NOBODY) | (before == me), me, MANY)
        region.read_epoch[at] = warp.epochs(lanes)[:, None]
        several = (region.reader[at] != me) & (region.reader[at] != MANY)
        if several.any():  # lanes of this very instruction
            region.reader[at[several]] = MANY

    def store(self, warp: Warp, lanes: Lanes, addresses: Addresses, data: NDArray[np.uint8]) -> None:
        region, at = self._places(addresses, data.shape[1], "write")
        if not region.writable:
            raise Fault(Kind.BOUNDS, f"write to {region.name}, which is read-only, byte {int(at[0, 0])}")
        launched = warp.block.launched
        launched.check_may_write(warp, lanes, region.name)
        me = np.broadcast_to(warp.numbers[lanes][:, None], at.shape)
        self._check_order(warp, lanes, region, at, "writer", "write")
        self._check_order(warp, lanes, region, at, "reader", "write")
        region.bytes[at] = data
        region.written[at] = True
        region.writer[at] = me
        region.write_epoch[at] = warp.epochs(lanes)[:, None]
        region.kernel[at] = launched.index
        if (region.writer[at] != me).any():
            raise Fault(Kind.RACE, f"two lanes write the same byte of {region.name} in one instruction")

    def _check_order(
        self, warp: Warp, lanes: Lanes, region: Region, at: NDArray[np.int64], whose: str, what: str
    ) -> None:
        """Whether this access is ordered after the last of `whose` ("writer", "reader")."""
        others = region.writer[at] if whose == "writer" else region.reader[at]
        me = warp.numbers[lanes][:, None]
        if not ((others != NOBODY) & (others != me)).any():
            return
        epochs = (region.write_epoch if whose == "writer" else region.read_epoch)[at]
        domain = warp.block.domain
        foreign = (others >= 0) & (others // domain.clocks.threads != domain.number)
        agents = np.where((others >= 0) & ~foreign, others % domain.clocks.threads, NOBODY).astype(np.int32)
        bad = foreign | (others == MANY) | warp.clocks.unordered(warp.index, lanes, agents, epochs)
        bad &= others != me
        if bad.any():
            lane, byte = (int(i[0]) for i in np.nonzero(bad))
            other = "several threads" if others[lane, byte] == MANY else f"thread {int(others[lane, byte])} of the grid"
            raise Fault(
                Kind.RACE,
                f"{what} of {region.name}, byte {int(at[lane, byte])}, by lane {int(lanes[lane])}: not ordered after "
                f"the {'write' if whose == 'writer' else 'read'} by {other}",
            )

    def read_box(self, launched: Launched, waited: bool, region: Region, at: NDArray[np.int64]) -> NDArray[np.uint8]:
        """What a tensor copy reads: bytes at these offsets."""
        if not region.written[at].all():
            offset = int(at[~region.written[at]][0])
            raise Fault(Kind.UNWRITTEN, f"{region.name}, byte {offset}, by a tensor copy")
        if region.writable:
            if launched.running and not waited and np.isin(region.kernel[at], launched.running).any():
                raise Fault(Kind.EARLY, f"tensor copy from {region.name}, which the kernel before writes")
            if (region.writer[at] != NOBODY).any():
                raise Fault(
                    Kind.RACE, f"tensor copy from {region.name}, which this kernel writes without a proxy fence"
                )
            region.reader[at] = MANY
        return region.bytes[at]


class SharedMemory:
    """One block's, in 32-bit words; sub-word accesses are not modelled. Addresses count from SHARED_BASE."""

    def __init__(self, size: int, clocks: Clocks, junk: Sequence[range], rng: np.random.Generator) -> None:
        """junk: byte ranges that may be read before anybody wrote them; they hold random bits."""
        words = -(-size // 4)
        self.size = size
        self.words = np.zeros(words, np.uint32)
        self.written = np.zeros(words, np.bool_)
        self.is_mbarrier = np.zeros(words, np.bool_)
        self.writer = np.full(words, NOBODY, np.int32)  # agents
        self.write_epoch = np.zeros(words, np.int32)
        self.reads = np.zeros((words, clocks.agents), np.int32)  # epoch of each agent's last read
        self.copies_from = clocks.threads  # the first agent that is an mbarrier
        for part in junk:
            at = slice(part.start // 4, part.stop // 4)
            self.words[at] = rng.integers(0, 1 << 32, len(self.words[at]), np.uint32)
            self.written[at] = True

    def places(self, addresses: Addresses, size: int, what: str) -> NDArray[np.int64]:
        """Word numbers [lanes, size / 4]."""
        if size % 4:
            raise Fault(Kind.UNKNOWN, f"{what} of {size} bytes of shared memory: only whole words are modelled")
        if (addresses & (size - 1)).any():
            raise Fault(Kind.ALIGNMENT, f"{what} of {size} bytes of shared memory at {int(addresses[0]):#x}")
        offsets = addresses - SHARED_BASE
        if int(offsets.min()) < 0 or int(offsets.max()) + size > self.size:
            worst = int(offsets.min()) if int(offsets.min()) < 0 else int(offsets.max())
            raise Fault(Kind.BOUNDS, f"{what} of {size} bytes at byte {worst} of {self.size} of shared memory")
        first = (offsets >> 2)[:, None]
        return first if size == 4 else first + np.arange(size // 4)

    def load(self, warp: Warp, lanes: Lanes, at: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Words at [lanes, n]."""
        if not self.written[at].all():
            lane = int(np.flatnonzero(~self.written[at].all(1))[0])
            self._refuse_mbarriers(at, "read")
            raise Fault(Kind.UNWRITTEN, f"shared memory, byte {int(at[lane, 0]) * 4} (lane {int(lanes[lane])})")
        bad = warp.clocks.unordered(warp.index, lanes, self.writer[at], self.write_epoch[at])
        if bad.any():
            lane, word = (int(i[0]) for i in np.nonzero(bad))
            self._race(warp, lanes[lane], at[lane, word], "read", int(self.writer[at[lane, word]]), "write")
        agents = warp.index * 32 + lanes
        self.reads[at, agents[:, None]] = warp.epochs(lanes)[:, None]
        return self.words[at]

    def store(self, warp: Warp, lanes: Lanes, at: NDArray[np.int64], data: NDArray[np.uint32]) -> None:
        self._refuse_mbarriers(at, "write")
        bad = warp.clocks.unordered(warp.index, lanes, self.writer[at], self.write_epoch[at])
        if bad.any():
            lane, word = (int(i[0]) for i in np.nonzero(bad))
            self._race(warp, lanes[lane], at[lane, word], "write", int(self.writer[at[lane, word]]), "write")
        agents = np.arange(self.reads.shape[1], dtype=np.int32)
        reads = self.reads[at]  # [lanes, n, agents]
        late = warp.clocks.unordered(warp.index, lanes, np.broadcast_to(agents, reads.shape), reads)
        if late.any():
            lane, word, agent = (int(i[0]) for i in np.nonzero(late))
            self._race(warp, lanes[lane], at[lane, word], "write", agent, "read")
        self.words[at] = data
        self.written[at] = True
        me = np.broadcast_to((warp.index * 32 + lanes)[:, None], at.shape)
        self.writer[at] = me
        self.write_epoch[at] = warp.epochs(lanes)[:, None]
        if (self.writer[at] != me).any():
            raise Fault(Kind.RACE, "two lanes write the same word of shared memory in one instruction")

    def make_mbarrier(self, offset: int) -> None:
        """From now on plain accesses and copies to these eight bytes are faults."""
        self.written[offset // 4 : offset // 4 + 2] = False
        self.is_mbarrier[offset // 4 : offset // 4 + 2] = True

    def _refuse_mbarriers(self, at: NDArray[np.int64], what: str) -> None:
        if self.is_mbarrier[at].any():
            raise Fault(
                Kind.BARRIER, f"{what} of shared memory at byte {int(at[self.is_mbarrier[at]][0]) * 4}: an mbarrier"
            )

    def _race(self, warp: Warp, lane: Any, word: Any, what: str, agent: int, other: str) -> None:
        threads = warp.clocks.threads
        who = f"warp {agent // 32}, lane {agent % 32}" if agent < threads else "a tensor copy"
        raise Fault(
            Kind.RACE,
            f"{what} of shared memory, byte {int(word) * 4}, lane {int(lane)}: not ordered after the {other} by {who}",
        )

    def land(self, at: NDArray[np.int64], data: NDArray[np.uint32], known: Any, slot: int, phase: int) -> None:
        """A tensor copy's words arrive; `known` is what its issuer knew, `slot` and `phase` what it completes on."""
        self._refuse_mbarriers(at, "tensor copy")
        writer, epoch = self.writer[at], self.write_epoch[at]
        generic = (writer != NOBODY) & (writer < self.copies_from)
        bad = (writer != NOBODY) & (known[KNOWN][writer] < epoch)
        if bad.any():
            raise Fault(
                Kind.RACE, f"tensor copy into shared memory, byte {int(at[bad][0]) * 4}: not ordered after a write"
            )
        unfenced = generic & (known[FENCED][writer] < epoch)
        if unfenced.any():
            raise Fault(
                Kind.RACE,
                f"tensor copy into shared memory, byte {int(at[unfenced][0]) * 4}: no fence.proxy.async after a write",
            )
        late = self.reads[at] > known[KNOWN]
        if late.any():
            word, agent = (int(i[0]) for i in np.nonzero(late))
            raise Fault(
                Kind.RACE,
                f"tensor copy into shared memory, byte {int(at[word]) * 4}: not ordered after the read by warp "
                f"{agent // 32}, lane {agent % 32}",
            )
        self.words[at] = data
        self.written[at] = True
        self.writer[at] = slot
        self.write_epoch[at] = phase
