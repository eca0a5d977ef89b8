"""What the FlashInfer drop-in costs beside its layer: its quantizer before and after, and the memory of raw weights.

``python -m mxfp4_moe.bench.dropin`` prints two tables for the GPU that it runs on, and without one the second alone:

- `mxfp8_quantize` as plain torch, which it was and is on the CPU, and as its one kernel: launches, microseconds behind
  an emptied L2 cache in a CUDA graph, and microseconds of the calling thread. Both results are compared, byte by byte.
- a layer's first call with raw weights kept and released: the most memory at once, and what stays. On a CPU this is
  the anonymous memory of a process for each; where torch cannot refuse reads of freed memory, and so releases nothing,
  they are let through: nobody reads raw weights here afterwards.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from .. import flashinfer_api
from ..flashinfer_api import SfLayout, quantizers, raw_memory
from ..formats import BLOCK
from .host import host_us
from .memory import Peak, anonymous_bytes, in_a_process
from .report import aligned
from .shapes import PRESETS, MoEShape, parse_tokens, shape_from
from .timing import Timer

ROWS = (1, 64, 4096)
_PAD = 128  # of a layer's sizes, as FlashInfer's callers pad them


def main(arguments: Sequence[str]) -> int:
    """The command; see this module."""
    parser = argparse.ArgumentParser(prog="python -m mxfp4_moe.bench.dropin", description=__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows to quantize, with commas between")
    parser.add_argument("--preset", default="gpt-oss-120b", choices=sorted(PRESETS), help="the layer")
    parser.add_argument("--child", choices=("keep", "release"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = shape_from(options.preset)
    if options.child:
        print(json.dumps(memory_on_cpu(shape, options.child)))
        return 0
    if not torch.cuda.is_available():
        print(f"CPU, torch {torch.__version__}; {shape.words}")
        rows = [
            in_a_process(__spec__.name, ["--preset", options.preset, "--child", way]) for way in ("keep", "release")
        ]
        print(_memory_lines([list(row.values()) for row in rows]))
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; {shape.words}")
    print(quantizer_table(shape.hidden, parse_tokens(options.rows), device))
    print()
    print(memory_table(shape, device))
    return 0


def quantizer_table(width: int, row_counts: Sequence[int], device: torch.device) -> str:
    """Both ways, in each layout of scales, for bfloat16 rows."""
    timer = Timer(device)
    lines = [["rows", "scales", "torch: launches", "us", "host us", "one kernel: launches", "us", "host us"]]
    for rows in row_counts:
        g = torch.Generator(device).manual_seed(rows)
        x = torch.randn(rows, width, generator=g, device=device, dtype=torch.float32).bfloat16()
        for layout in SfLayout:
            line = [str(rows), layout.name.removeprefix("layout_")]
            calls = quantizer_calls(x, layout)
            before, after = (call() for call in calls)
            for a, b in zip(before, after, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "the kernel and torch differ"
            for call in calls:
                us = timer.measure([call], 50).median
                line += [str(launches(call, device)), f"{us:.1f}", f"{host_us(call, device).median:.1f}"]
            lines.append(line)
    return "\n".join(aligned(lines, left=(1,)))


def launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels and copies of one call, by the profiler's records; `Timer.kernels` takes torch's "not" for its mark."""
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())


def quantizer_calls(x: Tensor, layout: SfLayout) -> tuple[Callable[[], tuple[Tensor, Tensor]], ...]:
    """The chain of torch's operators, and the drop-in."""
    return (
        lambda: quantizers._mxfp8_torch(x, x.shape[1], int(layout)),
        lambda: flashinfer_api.mxfp8_quantize(x, sf_swizzle_layout=layout),
    )


def memory_table(shape: MoEShape, device: torch.device) -> str:
    """A first call with each choice, in megabytes beyond what was there before the raw weights."""
    rows: list[list[str | int]] = []
    for choice in ("keep", "release"):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        tensors = raw_layer(shape, device)
        layer = sum(tensor.nbytes for tensor in tensors)
        torch.cuda.reset_peak_memory_stats(device)
        first_call(tensors, device, choice)
        numbers = (layer, 2 * layer // shape.experts)
        peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        rows.append([choice, *numbers, peak - before, after - before])
        del tensors
    return _memory_lines(rows)


def memory_on_cpu(shape: MoEShape, choice: str) -> dict[str, str | int]:
    """One choice in this process, in bytes."""
    if not raw_memory.can_refuse_reads():
        raw_memory._REFUSE_READS = lambda *unused: None
    device = torch.device("cpu")
    small = MoEShape(name="", experts=1, top_k=1, hidden=32, intermediate=32)
    first_call(raw_layer(small, device), device, "keep")  # what torch starts with its first operators
    before = anonymous_bytes()
    with Peak() as peak:
        tensors = raw_layer(shape, device)
        layer = sum(tensor.nbytes for tensor in tensors)
        first_call(tensors, device, choice, tokens=0)  # with one the reference would need more than preparing does
    gc.collect()
    after = anonymous_bytes() - before
    return {"raw": choice, "layer": layer, "two": 2 * layer // shape.experts, "peak": peak.most, "after": after}


def _memory_lines(rows: Sequence[Sequence[str | int]]) -> str:
    lines = [["raw weights", "layer MB", "two experts MB", "peak MB", "afterwards MB"]]
    lines += [[n if isinstance(n, str) else f"{n / 1e6:.0f}" for n in row] for row in rows]
    return "\n".join(aligned(lines, left=(0,)))


def raw_layer(shape: MoEShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's weights and scales as FlashInfer's callers have them: padded to 128; all weights 1.5, all scales 1."""
    hidden, inter = (-(-size // _PAD) * _PAD for size in (shape.hidden, shape.intermediate))

    def full(*sizes: int, dtype: torch.dtype, byte: int) -> Tensor:
        count = torch.Size(sizes).numel() * dtype.itemsize
        return torch.full((count,), byte, dtype=torch.uint8, device=device).view(dtype).view(sizes)

    return (
        full(shape.experts, 2 * inter, hidden // 16, dtype=torch.int64, byte=0x33),
        full(shape.experts, 2 * inter, hidden // (4 * BLOCK), dtype=torch.int32, byte=127),
        full(shape.experts, hidden, inter // 16, dtype=torch.int64, byte=0x33),
        full(shape.experts, hidden, inter // (4 * BLOCK), dtype=torch.int32, byte=127),
    )


def first_call(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], device: torch.device, choice: str, tokens: int = 1
) -> Tensor:
    """Tokens through the drop-in, which prepares the weights."""
    fc1, fc1_scale, fc2, fc2_scale = tensors
    unused = torch.ones(len(fc1), dtype=torch.float32, device=device)
    (result,) = flashinfer_api.cutlass_fused_moe(
        torch.zeros(tokens, fc1.shape[2] * 16, dtype=torch.bfloat16, device=device),
        torch.zeros(tokens, 1, dtype=torch.int32, device=device),
        None,
        fc1,
        fc2,
        torch.bfloat16,
        [fc1_scale, unused, fc2_scale, unused],
        use_mxfp8_act_scaling=True,
        raw_weights=choice,
    )
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
