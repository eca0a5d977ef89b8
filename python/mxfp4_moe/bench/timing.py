"""Time on the GPU: CUDA graphs replayed behind an emptied L2 cache, and the kernels that such a replay runs.

Each call is captured into a graph of its own; the graphs take turns, so that no replay finds its predecessor's weights
or routing. Before each, a buffer of several times the L2 cache is rewritten. All replays are queued without waiting in
between, so the GPU never waits for Python; two events around each give its time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch._C._autograd import DeviceType

from .kernel_records import KernelTime, Record, kernel_times, split_calls
from .statistics import Summary, summarize

Call = Callable[[], object]

WARM_UPS = 3
_MARKER = "bitwise_not"  # in the name of the kernel that rewrites the buffer


class Timer:
    """Clocks calls on one GPU. Holds the buffer that empties the L2 cache, 256 MiB or more."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self.flush_bytes = max(256 << 20, 4 * l2)
        self._buffer = torch.zeros(self.flush_bytes // 4, dtype=torch.int32, device=device)

    def flush(self) -> None:
        """Queues the rewriting of the buffer, after which the L2 cache holds nothing else."""
        self._buffer.bitwise_not_()

    def measure(self, calls: Sequence[Call], replays: int) -> Summary:
        """Microseconds of one call, over `replays` replays that rotate through the calls."""
        graphs = self._capture(calls)
        for graph in graphs:
            graph.replay()
        events = []
        torch.cuda.synchronize(self.device)
        for place in range(max(replays, len(graphs))):
            start, end = _event(), _event()
            self.flush()
            start.record()
            graphs[place % len(graphs)].replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.device)
        del graphs
        torch.cuda.empty_cache()  # what the graphs' calls had allocated; else it adds up over many of them
        return summarize([start.elapsed_time(end) * 1e3 for start, end in events])

    def kernels(self, call: Call, replays: int = 8) -> list[KernelTime]:
        """The kernels of one call in order, by the profiler's records of replays behind an emptied L2 cache.

        Raises:
            ValueError: the profiler saw no kernels, or not the same in each replay.
        """
        (graph,) = self._capture([call])
        self.flush()
        graph.replay()
        torch.cuda.synchronize(self.device)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            for _ in range(replays):
                self.flush()
                graph.replay()
            torch.cuda.synchronize(self.device)
        records = [
            Record(name=event.name, start=float(event.time_range.start), end=float(event.time_range.end))
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA
        ]
        return kernel_times(split_calls(records, _MARKER))

    def _capture(self, calls: Sequence[Call]) -> list[torch.cuda.CUDAGraph]:
        """One graph for each call, from one pool of memory: they never run at the same time."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()
        graphs = []
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                for _ in range(WARM_UPS):
                    call()
            # As `torch.cuda.graph` does, but once for all: it would collect garbage before every capture.
            torch.cuda.synchronize(self.device)
            gc.collect()
            for call in calls:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    call()
                finally:
                    graph.capture_end()
                graphs.append(graph)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return graphs


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def elapsed_us(call: Call, times: int, warm_ups: int = WARM_UPS) -> Summary:
    """Microseconds of a call that is queued as it is, without a graph and with a warm cache: for long kernels."""
    for _ in range(warm_ups):
        call()
    events = []
    torch.cuda.synchronize()
    for _ in range(times):
        start, end = _event(), _event()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return summarize([start.elapsed_time(end) * 1e3 for start, end in events])
