"""Happens-before: who knows of whose accesses, by vector clocks over single threads (lanes), not warps.

The threads that can be ordered by barriers are one domain: a block, or a cluster of blocks. Agents of a domain are its
threads and its mbarriers, which stand for the tensor copies that complete on them. A thread's accesses carry its epoch;
a release (arrival, barrier) gives its knowledge away and starts the next epoch; an acquire (a wait that returned, the
end of a barrier) takes knowledge in. An access is ordered after an earlier one if its thread knows of that epoch.

Knowledge comes in two layers: what happened before, and what happened before some proxy fence that happened before.
The async proxy (tensor copies) sees generic writes only of the second kind (PTX ISA, "Proxies").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

KNOWN, FENCED = 0, 1
MBARRIERS = 64  # agents for them, per block


class Clocks:
    """The knowledge of all threads of a domain."""

    def __init__(self, threads: int, mbarriers: int) -> None:
        self.threads = threads
        self.agents = threads + mbarriers
        self.own: Ints = np.ones(threads, np.int32)  # each thread's epoch
        # Per warp [2, 1 or 32, agents]: one row as long as all its lanes know the same of others.
        self.rows: list[Ints] = [np.zeros((2, 1, self.agents), np.int32) for _ in range(threads // 32)]

    def _each_lane(self, warp: int) -> Ints:
        rows = self.rows[warp]
        if rows.shape[1] == 1:
            rows = self.rows[warp] = np.repeat(rows, 32, axis=1)
        return rows

    def release(self, warp: int, lanes: Bools | None) -> Ints:
        """What these lanes know, together and with their own accesses so far: [2, agents]. Starts their next epoch."""
        rows = self.rows[warp]
        given = rows.max(1) if lanes is None or rows.shape[1] == 1 else rows[:, lanes].max(1)
        own = self.own[warp * 32 : warp * 32 + 32]
        mine = given[KNOWN, warp * 32 : warp * 32 + 32]
        if lanes is None:
            mine[:] = own
            own += 1
        else:
            mine[lanes] = own[lanes]
            own[lanes] += 1
        return given

    def acquire(self, warp: int, lanes: Bools | None, given: Ints) -> None:
        rows = self.rows[warp]
        if rows.shape[1] == 1 and (lanes is None or bool((given <= rows[:, 0]).all())):
            np.maximum(rows[:, 0], given, out=rows[:, 0])
            return
        rows = self._each_lane(warp)
        if lanes is None:
            np.maximum(rows, given[:, None], out=rows)
        else:
            rows[:, lanes] = np.maximum(rows[:, lanes], given[:, None])

    def meet(self, warp: int, lanes: Bools | None) -> None:
        """bar.warp.sync: all of these lanes know what any of them knew."""
        given = self.release(warp, lanes)
        if lanes is None:
            self.rows[warp] = given[:, None].copy()
        else:
            self.acquire(warp, lanes, given)

    def fence_async(self, warp: int, lanes: Bools | None) -> None:
        """fence.proxy.async: what these lanes know so far is visible to copies that come after."""
        rows = self._each_lane(warp)
        chosen = np.arange(32) if lanes is None else np.flatnonzero(lanes)
        rows[FENCED, chosen] = rows[KNOWN, chosen]
        rows[FENCED, chosen, warp * 32 + chosen] = self.own[warp * 32 + chosen]
        self.own[warp * 32 + chosen] += 1

    def knowledge(self, warp: int, lane: int) -> Ints:
        """A copy of what one lane knows, its own accesses so far included: [2, agents]."""
        rows = self.rows[warp]
        known = rows[:, lane if rows.shape[1] > 1 else 0].copy()
        known[KNOWN, warp * 32 + lane] = self.own[warp * 32 + lane]
        return known

    def unordered(self, warp: int, lanes: NDArray[np.intp], agents: Ints, epochs: Ints) -> Bools:
        """Which earlier accesses (of `agents` in `epochs`, shaped [lanes, ...]) a lane does not know of."""
        rows = self.rows[warp]
        shape = (-1,) + (1,) * (agents.ndim - 1)
        known = rows[KNOWN, 0][agents] if rows.shape[1] == 1 else rows[KNOWN][lanes.reshape(shape), agents]
        return (known < epochs) & (agents != (warp * 32 + lanes).reshape(shape)) & (agents >= 0)
