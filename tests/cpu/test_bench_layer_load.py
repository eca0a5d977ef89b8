"""What loading a layer costs: the bench counts what was read, and memory that was there."""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

import pytest

from mxfp4_moe.bench import layer_load, memory
from mxfp4_moe.bench.shapes import MoEShape

SHAPE = MoEShape(name="", experts=8, top_k=2, hidden=256, intermediate=512)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(("part", "share"), [("the layer", 1), ("rank 1 of 4, experts", 4)])
def test_a_part_reads_its_share_and_headers(tmp_path: Path, part: str, share: int) -> None:
    model = layer_load.write_layer(tmp_path, SHAPE)
    per_output = 17 / 32  # codes and scales of a weight
    weights = SHAPE.experts * 3 * SHAPE.hidden * SHAPE.intermediate * per_output
    biases = SHAPE.experts * (2 * SHAPE.intermediate + SHAPE.hidden) * 2
    headers = 64 * 1024  # of two files, index, config, and what the peak itself reads of /proc
    found = layer_load.load(model, part)
    least = weights / share + biases
    assert least <= found["bytes_read"] <= least + headers + 2000 * 1000 * found["seconds"]
    assert found["layer_bytes"] > weights / share
    assert found["two_experts_bytes"] == 2 * (weights + biases) // SHAPE.experts
    assert part in layer_load.table([found])


def test_a_part_of_the_rows_reads_fewer_bytes(tmp_path: Path) -> None:
    model = layer_load.write_layer(tmp_path, SHAPE)
    whole, part = (layer_load.load(model, name) for name in ("the layer", "rank 1 of 4, tensors"))
    assert part["layer_bytes"] < 0.3 * whole["layer_bytes"]


def _fresh(size: int) -> mmap.mmap:
    """Memory from the kernel alone, each page written. An allocator may hand out pages that were resident already."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, mmap.PAGESIZE):
        pages[start] = 1
    return pages


def test_the_peak_is_memory_that_was_there_for_a_while() -> None:
    size = 64 * 2**20
    with memory.Peak() as peak:
        _fresh(size).close()
        kept = _fresh(size // 4)
    assert peak.most > 0.9 * (size // 4)
    kept.close()
    with memory.Peak() as peak:
        two = [_fresh(size) for _ in range(2)]
    assert 1.9 * size < peak.most < 2.5 * size
    for pages in two:
        pages.close()


def test_the_peak_sees_what_is_gone_at_the_end() -> None:
    size = 64 * 2**20
    with memory.Peak() as peak:
        pages = _fresh(size)
        time.sleep(1)  # two hundred looks
        pages.close()
    assert 0.9 * size < peak.most < 1.5 * size
