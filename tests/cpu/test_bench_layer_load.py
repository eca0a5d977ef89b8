"""What loading a layer costs: the bench counts what was read, and memory that was there."""

from __future__ import annotations

import json
import subprocess
import sys
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


_PEAKS = """
import importlib.util, json, mmap, sys, time

spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
SIZE = 2**26


def fresh(size):
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, mmap.PAGESIZE):
        pages[start] = 1
    return pages


with memory.Peak() as kept:
    fresh(SIZE).close()
    pages = fresh(SIZE // 4)
pages.close()
with memory.Peak() as both:
    pages = [fresh(SIZE) for _ in range(2)]
for each in pages:
    each.close()
with memory.Peak() as gone:
    pages = fresh(SIZE)
    time.sleep(1)  # two hundred looks
    pages.close()
print(json.dumps([peak.most / SIZE for peak in (kept, both, gone)]))
"""


def test_the_peak_is_memory_that_was_there_for_a_while() -> None:
    """Memory from the kernel, each page written, in a process where nothing else takes or gives back any."""
    ran = subprocess.run([sys.executable, "-c", _PEAKS, memory.__file__], stdout=subprocess.PIPE, text=True, check=True)
    kept, both, gone = json.loads(ran.stdout)
    assert 0.24 < kept < 1.1
    assert 1.95 < both < 2.1
    assert 0.95 < gone < 1.1
