"""Tiny kernels, written by hand, for the tests of the executor itself."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest

from .faults import Fault, Kind
from .launch import Launch
from .machine import Machine

SEEDS = range(4)  # orders of warps, and of copies that land


def kernel(body: str, registers: str = "", params: str = ".param .u64 a, .param .u64 b") -> str:
    return f"""
.version 9.0
.target sm_120f
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k({params}) {{
  .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .b64 %d<20>; {registers}
  mov.u32 %r0, %tid.x; mov.u32 %r1, smem; ld.param.u64 %d0, [a]; ld.param.u64 %d1, [b];
  mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
  shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;
  {body}
  ret;
}}
"""


class Run:
    """`a` is read, `b` is written: 64 words each, or as many as are given, of which a's are 0, 1, 2 ..."""

    def __init__(
        self, seed: int = 0, lateness: float | None = None, resident: int = 4, a: np.ndarray | None = None
    ) -> None:
        self.a = np.arange(64, dtype=np.uint32) if a is None else a
        self.b = np.full(len(self.a), 0xFFFFFFFF, np.uint32)
        self.machine = Machine(seed=seed, lateness=lateness, resident=resident)
        self.machine.memory.add("a", self.a, written=True, writable=True)
        self.machine.memory.add("b", self.b, written=False, writable=True)

    def __call__(
        self,
        body: str,
        *,
        threads: int = 32,
        grid: int = 1,
        cluster: int = 1,
        smem: int = 1024,
        params: Sequence[bytes] | None = None,
        heading: str = ".param .u64 a, .param .u64 b",
        programmatic: bool = False,
    ) -> np.ndarray:
        given = [struct.pack("<Q", x.ctypes.data) for x in (self.a, self.b)] + list(params or [])
        one = Launch(
            kernel="k",
            grid=(grid, 1, 1),
            block=(threads, 1, 1),
            cluster=(cluster, 1, 1),
            smem_bytes=smem,
            programmatic=programmatic,
            params=tuple(given),
        )
        self.machine.run(kernel(body, params=heading), one)
        return self.b


def fails(kind: Kind, body: str, text: str = "", **options: object) -> str:
    """The fault that a body ends in, under every seed."""
    message = ""
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            Run(seed)(body, **options)
        assert caught.value.kind is kind, caught.value
        assert text in str(caught.value)
        assert caught.value.place or kind is Kind.HANG
        message = str(caught.value)
    return message


def works(body: str, **options: object) -> np.ndarray:
    return [Run(seed)(body, **options) for seed in SEEDS][-1]
