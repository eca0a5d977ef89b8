"""The PTX executor itself: tiny kernels, each with one mistake that it must report, and the same without the mistake.

And what it computes: instructions against independent arithmetic, fragments against the ISA's maps.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import floats, mma, scalar
from ptx.faults import Fault, Kind
from ptx.launch import Launch
from ptx.machine import Machine
from ptx.tensor_copy import MAGIC

from mxfp4_moe import arithmetic, formats

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
    """`a` is read, `b` is written: 64 words each, of which a's are 0, 1, 2 ..."""

    def __init__(self, seed: int = 0, lateness: float | None = None, resident: int = 4) -> None:
        self.a = np.arange(64, dtype=np.uint32)
        self.b = np.full(64, 0xFFFFFFFF, np.uint32)
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


# ---- memory ---------------------------------------------------------------------------------------------------------

COPY_A_TO_B = "ld.global.u32 %r4, [%d3]; st.global.u32 [%d4], %r4;"
SHARED = "st.shared.u32 [%r3], %r0;"


def test_plain_copy() -> None:
    assert works(COPY_A_TO_B, threads=64).tolist() == list(range(64))


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        (Kind.BOUNDS, "ld.global.u32 %r4, [%d3+132];", "in no array"),
        (Kind.BOUNDS, "ld.global.u32 %r4, [%d3+-4];", "in no array"),
        (Kind.BOUNDS, "st.global.u32 [%d4+256], %r0;", "in no array"),
        (Kind.ALIGNMENT, "ld.global.u32 %r4, [%d3+2];", "of 4 bytes"),
        (Kind.ALIGNMENT, "ld.global.v2.u32 {%r4, %r5}, [%d0+4];", "of 8 bytes"),
        (Kind.UNWRITTEN, "ld.global.u32 %r4, [%d4];", "b, byte 0"),
        (Kind.UNWRITTEN, "ld.shared.u32 %r4, [%r3];", "shared memory, byte 0"),
        (Kind.BOUNDS, "st.shared.u32 [%r3+900], %r0;", "of shared memory"),
        (Kind.BOUNDS, "st.shared.u32 [%r3+-4], %r0;", "of shared memory"),
        (Kind.ALIGNMENT, "st.shared.v2.u32 [%r3+4], {%r0, %r0};", "of 8 bytes"),
        (Kind.BOUNDS, "ld.param.u32 %r4, [b+8];", "ld.param"),
        (Kind.UNKNOWN, "st.shared.u8 [%r3], %r0;", "only whole words"),
    ],
)
def test_memory_faults(kind: Kind, body: str, text: str) -> None:
    fails(kind, body, text)


def test_constants_may_not_be_written() -> None:
    run = Run()
    run.machine.memory["a"].writable = False
    with pytest.raises(Fault, match="write to a, which is read-only"):
        run("st.global.u32 [%d3], %r0;")


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.u32 %r4, %r0;",
        "add.sat.s32 %r4, %r0, %r0;",
        "ld.global.L2::128B.u32 %r4, [%d3];",
        "ld.volatile.global.u32 %r4, [%d3];",
        "ld.shared.nc.u32 %r4, [%r3];",
        "atom.global.add.u32 %r4, [%d4], 1;",
        "cvt.rzi.s32.f32 %r4, %r0;",
        "fma.rz.f32 %r4, %r0, %r0, %r0;",
        "mbarrier.arrive.noComplete.shared::cta.b64 _, [%r1], 1;",
        "fence.acq_rel.gpu;",
        "shfl.sync.wrap.b32 %r4|%p0, %r0, 0, 31, -1;",
        "mov.u32 %r4, %clock;",
        "call foo;",
        "setp.lt.or.u32 %p1, %r0, %r0, %p2;",
        "@%p1 bar.sync 0;",
    ],
)
def test_what_is_not_known_is_refused(body: str) -> None:
    with pytest.raises(Fault) as caught:
        Run()(body)
    assert caught.value.kind is Kind.UNKNOWN, caught.value


# ---- races ----------------------------------------------------------------------------------------------------------

OTHER_WARP = "xor.b32 %r5, %r3, 128; "  # the word of the same lane in the other warp
OTHER_LANE = "xor.b32 %r5, %r3, 4; "


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (SHARED + OTHER_WARP + "ld.shared.u32 %r4, [%r5];", ""),
        (SHARED + OTHER_LANE + "ld.shared.u32 %r4, [%r5];", "read of shared memory"),
        (SHARED + "bar.sync 0;" + OTHER_WARP + "ld.shared.u32 %r4, [%r5];" + SHARED, "not ordered after the"),
        (SHARED + "bar.warp.sync -1;" + OTHER_LANE + "ld.shared.u32 %r4, [%r5];" + SHARED, "not ordered after the read"),
        ("st.shared.u32 [%r1], %r0;", "two lanes"),
        ("st.global.u32 [%d1], %r0;", "two lanes"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 st.global.u32 [%d1], %r0; setp.eq.s32 %p2, %r0, 33; @%p2 st.global.u32 [%d1], %r0;", ""),
        ("ld.global.u32 %r4, [%d0]; bar.sync 0; setp.eq.s32 %p1, %r0, 0; @%p1 st.global.u32 [%d0], %r0;", "several threads"),
    ],
)
def test_races(body: str, text: str) -> None:
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            Run(seed)(body, threads=64)
        # A warp that runs first reads what nobody wrote yet: the same mistake seen from the other side.
        assert caught.value.kind in (Kind.RACE, Kind.UNWRITTEN), caught.value
        assert text in str(caught.value) or caught.value.kind is Kind.UNWRITTEN


@pytest.mark.parametrize(
    "body",
    [
        SHARED + "bar.sync 0;" + OTHER_WARP + "ld.shared.u32 %r4, [%r5]; bar.sync 0;" + SHARED,
        SHARED + "bar.warp.sync -1;" + OTHER_LANE + "ld.shared.u32 %r4, [%r5]; bar.warp.sync -1;" + SHARED,
        SHARED + "bar.sync 3, 64;" + OTHER_WARP + "ld.shared.u32 %r4, [%r5];",
        "st.global.u32 [%d4], %r0; bar.sync 0; xor.b32 %r5, %r0, 33; mul.wide.u32 %d5, %r5, 4; add.s64 %d6, %d1, %d5;"
        "ld.global.u32 %r4, [%d6];",
    ],
)
def test_barriers_order(body: str) -> None:
    works(body, threads=64)


def test_blocks_of_a_grid_are_not_ordered() -> None:
    write = "st.global.u32 [%d4], %r0; bar.sync 0;"
    fails(Kind.RACE, write, "not ordered after the write by thread", grid=2)
    fails(Kind.RACE, COPY_A_TO_B + "st.global.u32 [%d3], %r0;", "a, byte", grid=2)


CLUSTER = (
    "mov.u32 %r6, %cluster_ctarank; xor.b32 %r7, %r6, 1; cvt.u64.u32 %d5, %r3; cvta.shared.u64 %d6, %d5;"
    "mapa.u64 %d7, %d6, %r7; add.s32 %r8, %r6, 40; st.shared.u32 [%r3], %r8;"
)
FROM_THE_OTHER = "ld.u32 %r9, [%d7]; setp.eq.s32 %p1, %r6, 0; @%p1 st.global.u32 [%d4], %r9;"
ALL_OF_CLUSTER = "barrier.cluster.arrive; barrier.cluster.wait;"


def test_clusters() -> None:
    out = works(CLUSTER + ALL_OF_CLUSTER + FROM_THE_OTHER + ALL_OF_CLUSTER, grid=2, cluster=2)
    assert out[:32].tolist() == [41] * 32
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            Run(seed)(CLUSTER + FROM_THE_OTHER + ALL_OF_CLUSTER, grid=2, cluster=2)
        assert caught.value.kind in (Kind.RACE, Kind.UNWRITTEN)
    fails(Kind.BARRIER, "barrier.cluster.wait;", "without arrive")


def test_a_block_may_not_leave_while_others_read_its_memory() -> None:
    kinds = set()
    for seed in range(20):
        try:
            Run(seed)(CLUSTER + ALL_OF_CLUSTER + FROM_THE_OTHER, grid=2, cluster=2)
        except Fault as fault:
            kinds.add(fault.kind)
    assert kinds == {Kind.BOUNDS}


# ---- mbarriers and tensor copies --------------------------------------------------------------------------------------

ZERO = "setp.eq.s32 %p1, %r0, 0; setp.ne.s32 %p3, %r0, 0; add.s32 %r10, %r1, 1024;"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r10], 1;"
FENCE = "@%p1 fence.mbarrier_init.release.cluster;"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], %r11;"
COPY = (
    "mov.b64 %d8, map; cvta.param.u64 %d9, %d8; mov.b32 %r12, 0; mov.b32 %r13, ROW;"
    "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%d9, {%r12, %r13}], [%r10];"
)


def wait(parity: int = 0) -> str:
    return f"{{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r10], {parity}; @!done bra again; }}"


def tensor_map(address: int, *, rows: int = 4, box: tuple[int, int] = (16, 4), kind: int = 3, swizzle: int = 0) -> bytes:
    """Words, 16 to a row."""
    words = struct.pack("<QIIQ5Q4Q5IHHHH", MAGIC, kind, 2, address, 16, rows, 0, 0, 0, 64, 0, 0, 0, *box, 0, 0, 0, 0, swizzle, 0, 0)
    return words + bytes(4)


def copies(
    body: str, *, seed: int = 0, lateness: float | None = None, row: int = 0, threads: int = 64, bytes_: int = 256, **map_: object
) -> np.ndarray:
    run = Run(seed, lateness)
    given = [tensor_map(run.a.ctypes.data, **map_)]
    heading = ".param .u64 a, .param .u64 b, .param .align 64 .b8 map[128]"
    text = ZERO + f"mov.u32 %r11, {bytes_};" + body.replace("ROW", str(row))
    return run(text, threads=threads, smem=2048, params=given, heading=heading)


SETUP = INIT + FENCE + "bar.sync 0;"
TO_B = "ld.shared.u32 %r4, [%r3]; st.global.u32 [%d4], %r4;"
PIPE = SETUP + EXPECT + COPY + wait()


@pytest.mark.parametrize("lateness", [0.1, 5, 1000])
def test_copy(lateness: float) -> None:
    for seed in SEEDS:
        assert copies(PIPE + TO_B, seed=seed, lateness=lateness).tolist() == list(range(64))


def test_copy_fills_with_zeros_and_counts_them() -> None:
    assert copies(PIPE + TO_B, row=-1).tolist() == [*[0] * 16, *range(48)]
    assert copies(PIPE + TO_B, row=3).tolist() == [*range(48, 64), *[0] * 48]
    assert copies(PIPE + TO_B, row=2, rows=3).tolist() == [*range(32, 48), *[0] * 48]


def test_copy_swizzles_by_the_address() -> None:
    """Rows of 128 bytes; chunk c of row r stands at chunk c ^ (r % 8)."""
    run = Run()
    source = np.arange(16 * 32, dtype=np.uint32)
    run.machine.memory.add("source", source, written=True, writable=False)
    out = np.zeros(16 * 32, np.uint32)
    run.machine.memory.add("out", out, written=False, writable=True)
    given = struct.pack(
        "<QIIQ5Q4Q5IHHHH", MAGIC, 3, 2, source.ctypes.data, 32, 16, 0, 0, 0, 128, 0, 0, 0, 32, 16, 0, 0, 0, 0, 3, 0, 0
    )
    body = ZERO + "add.s32 %r10, %r1, 2048; mov.u32 %r11, 2048;" + SETUP + EXPECT + COPY.replace("ROW", "0") + wait()
    body += "".join(
        f"ld.shared.u32 %r4, [%r3+{at}]; st.global.u32 [%d4+{at}], %r4;" for at in range(0, 2048, 128)
    )
    run.b = out
    heading = ".param .u64 a, .param .u64 b, .param .align 64 .b8 map[128]"
    run(body, smem=2064, params=[given + bytes(4)], heading=heading)
    row, chunk = np.divmod(np.arange(128), 8)
    assert np.array_equal(out.reshape(128, 4), source.reshape(128, 4)[row * 8 + (chunk ^ row % 8)])


@pytest.mark.parametrize(
    ("kinds", "body", "text"),
    [
        ({Kind.UNWRITTEN, Kind.RACE}, SETUP + EXPECT + COPY + TO_B + wait(), ""),  # no wait
        ({Kind.UNWRITTEN, Kind.RACE}, SETUP + EXPECT + COPY + wait(1) + TO_B + wait(), ""),  # wrong parity
        ({Kind.BARRIER, Kind.COPY}, SETUP + COPY + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];" + wait(), "block 0 exits"),
        ({Kind.UNWRITTEN, Kind.RACE}, SETUP + COPY + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];" + wait() + TO_B, ""),
        ({Kind.COPY}, SETUP + EXPECT + COPY, "copies in flight"),
        ({Kind.RACE}, INIT + "bar.sync 0;" + EXPECT + COPY + wait(), "no fence between its init and a tensor copy"),
        ({Kind.RACE, Kind.BARRIER}, INIT + FENCE + EXPECT + COPY + wait(), "mbarrier"),
        ({Kind.BARRIER}, "bar.sync 0;" + EXPECT, "no mbarrier was initialized"),
        ({Kind.BARRIER}, INIT + INIT, "was initialized before"),
        ({Kind.BARRIER}, SETUP + "mov.u32 %r11, 1048576;" + EXPECT, "transaction count"),
        ({Kind.BARRIER}, SETUP + "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;", ""),
        ({Kind.BARRIER}, SETUP + "ld.shared.u32 %r4, [%r10];", ": an mbarrier"),
        ({Kind.BARRIER}, SETUP + "bar.sync 0; @%p1 st.shared.u32 [%r10], %r0;", ": an mbarrier"),
        ({Kind.HANG}, SETUP + wait(), "again"),
        ({Kind.HANG}, SETUP + "mov.u32 %r11, 512;" + EXPECT + COPY + wait(), "mbarrier.try_wait"),
        ({Kind.ALIGNMENT}, SETUP + EXPECT + "add.s32 %r1, %r1, 16;" + COPY, "tensor copy"),
        ({Kind.BOUNDS}, SETUP + EXPECT + "add.s32 %r1, %r1, 1920;" + COPY, "tensor copy"),
        ({Kind.BARRIER}, SETUP + EXPECT + "add.s32 %r1, %r1, 896;" + COPY + wait(), "tensor copy"),
        ({Kind.COPY}, SETUP + EXPECT + COPY.replace("map;", "a;") + wait(), "no tensor map"),
    ],
)
def test_copy_faults(kinds: set[Kind], body: str, text: str) -> None:
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            copies(body, seed=seed)
        assert caught.value.kind in kinds, caught.value
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rows": 5, "row": 1}, "in no array"),
        ({"swizzle": 1}, "swizzle 1"),
        ({"swizzle": 3, "box": (64, 1)}, "exceeds the swizzle's 128"),
        ({"box": (16, 0)}, "a side outside 1..256"),
        ({"box": (2, 4)}, "no multiple of 16"),
        ({"kind": 12}, "type 12"),
    ],
)
def test_tensor_maps_that_cannot_be(options: dict[str, object], text: str) -> None:
    with pytest.raises(Fault, match=text):
        copies(PIPE, **options)


REUSE = PIPE + "ld.shared.u32 %r4, [%r3];"  # then the same memory is filled again, as a pipeline's stage is
REUSED_BARRIER = "add.s32 %r14, %r1, 1032; @%p1 mbarrier.init.shared::cta.b64 [%r14], 2;"
ARRIVE = "{sync} and.b32 %r15, %r0, 31; setp.eq.s32 %p4, %r15, 0; @%p4 mbarrier.arrive.shared::cta.b64 _, [%r14];"
EMPTY = (
    "@%p3 bra skip; {{ .reg .pred done; more: mbarrier.try_wait.parity.shared::cta.b64 done, [%r14], 0; @!done bra more; }} skip:"
)


def ring(sync: str = "bar.warp.sync -1;", empty: str = EMPTY.format()) -> str:
    return REUSED_BARRIER + REUSE + ARRIVE.format(sync=sync) + empty + EXPECT + COPY + wait(1) + TO_B


def test_a_stage_is_filled_again() -> None:
    for seed in SEEDS:
        assert copies(ring(), seed=seed).tolist() == list(range(64))


def test_a_stage_filled_again_too_early() -> None:
    """Without __syncwarp before the one lane's arrival, the others' reads are not ordered before the copy."""
    for seed in SEEDS:
        for body in (ring(sync=""), ring(empty="")):
            with pytest.raises(Fault) as caught:
                copies(body, seed=seed)
            assert caught.value.kind is Kind.RACE, caught.value
            assert "tensor copy into shared memory" in str(caught.value)


PLAIN_FIRST = INIT + FENCE + SHARED + "{} bar.sync 0;"


def test_a_copy_after_plain_writes_needs_a_proxy_fence() -> None:
    for seed in SEEDS:
        with pytest.raises(Fault, match="no fence.proxy.async after a plain write"):
            copies(PLAIN_FIRST.format("") + EXPECT + COPY + wait(), seed=seed)
        copies(PLAIN_FIRST.format("fence.proxy.async.shared::cta;") + EXPECT + COPY + wait(), seed=seed)


# ---- other barriers, and lanes ----------------------------------------------------------------------------------------


def test_hangs_say_where() -> None:
    text = fails(Kind.HANG, "setp.lt.u32 %p1, %r0, 32; @%p1 bra end; bar.sync 1, 64; end:", threads=64)
    assert "warp 1, " in text
    assert "bar.sync 1, 64" in text


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Kind.BARRIER, "bar.sync 1, 96;"),
        (Kind.BARRIER, "bar.sync 1, 33;"),
        (Kind.BARRIER, "setp.lt.u32 %p1, %r0, 32; @%p1 bra one; bar.sync 1, 64; ret; one: bar.sync 1, 32;"),
        (Kind.CONVERGENCE, "setp.lt.u32 %p1, %r0, 5; @%p1 ret_here; "),
        (Kind.CONVERGENCE, "shfl.sync.idx.b32 %r4|%p1, %r0, 0, 31, 0xFFFF;"),
        (Kind.CONVERGENCE, "setp.eq.s32 %p1, %r0, 3; @%p1 bra out; bar.warp.sync -1; out:"),
        (Kind.CONVERGENCE, "setp.eq.s32 %p1, %r0, 3; @%p1 bra out; bar.sync 0; out:"),
        (Kind.REGISTERS, "setmaxnreg.inc.sync.aligned.u32 100;"),
        (Kind.REGISTERS, "setp.lt.u32 %p1, %r0, 32; @%p1 bra one; setmaxnreg.dec.sync.aligned.u32 24; one:"),
    ],
)
def test_barrier_and_lane_faults(kind: Kind, body: str) -> None:
    if "ret_here" in body:
        body = "setp.lt.u32 %p1, %r0, 5; @!%p1 bra go; ret; go: bar.warp.sync -1;"
    for seed in SEEDS:
        with pytest.raises(Fault) as caught:
            Run(seed)(body, threads=64)
        assert caught.value.kind is kind or (caught.value.kind is Kind.HANG and kind is Kind.BARRIER), caught.value


def test_divergence_and_loops() -> None:
    """Each lane loops its own number of times, odd ones on another path."""
    body = """
    mov.b32 %r4, 0; mov.u32 %r5, %r0;
    loop: setp.eq.s32 %p1, %r5, 0; @%p1 bra done;
    and.b32 %r6, %r5, 1; setp.eq.s32 %p2, %r6, 1; @%p2 bra odd;
    add.s32 %r4, %r4, 100; bra next;
    odd: add.s32 %r4, %r4, 1;
    next: sub.s32 %r5, %r5, 1; bra loop;
    done: st.global.u32 [%d4], %r4;
    """
    expected = [lane // 2 * 100 + (lane + 1) // 2 for lane in range(64)]
    for seed in SEEDS:
        assert Run(seed)(body, threads=64).tolist() == expected


def test_lanes_meet_where_they_must() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 7; @%p1 bra low; add.s32 %r4, %r0, 1; bra meet; low: mov.u32 %r4, 50;
    meet: shfl.sync.bfly.b32 %r5|%p2, %r4, 31, 31, -1; st.global.u32 [%d4], %r5;
    """
    values = [50 if lane < 7 else lane + 1 for lane in range(32)]
    for seed in SEEDS:
        assert Run(seed)(body)[:32].tolist() == values[::-1]


# ---- grids one behind the other ---------------------------------------------------------------------------------------

GRID_WAIT = "griddepcontrol.wait; griddepcontrol.launch_dependents;"


def after_a_kernel_that_wrote_a(body: str, **options: object) -> np.ndarray:
    run = Run()
    run.machine.pretend_kernel(["a"])
    return run(body, programmatic=True, **options)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Kind.EARLY, COPY_A_TO_B),
        (Kind.EARLY, "st.global.u32 [%d4], %r0;" + GRID_WAIT),
        (Kind.EARLY, "ld.global.cg.u32 %r4, [%d3];" + GRID_WAIT),
        (Kind.EARLY, "setp.lt.u32 %p1, %r0, 32; @%p1 bra skip; griddepcontrol.wait; skip:" + COPY_A_TO_B),
        (Kind.STALE, GRID_WAIT + "ld.global.nc.u32 %r4, [%d3];"),
    ],
)
def test_what_the_kernel_before_writes(kind: Kind, body: str) -> None:
    with pytest.raises(Fault) as caught:
        after_a_kernel_that_wrote_a(body, threads=64)
    assert caught.value.kind is kind, caught.value


def test_after_the_wait_it_is_there() -> None:
    assert after_a_kernel_that_wrote_a(GRID_WAIT + COPY_A_TO_B, threads=64).tolist() == list(range(64))


def test_kernels_in_a_row() -> None:
    """The second does not wait, so the third may start while the first still runs."""
    for first, second, fault in [
        (GRID_WAIT, GRID_WAIT, False),
        ("griddepcontrol.launch_dependents;", GRID_WAIT, True),
        ("griddepcontrol.launch_dependents; griddepcontrol.wait;", GRID_WAIT, False),
    ]:
        run = Run()
        run("st.global.u32 [%d3], %r0;", threads=64)
        run(first, programmatic=True)
        if fault:
            with pytest.raises(Fault, match="the kernel between did not wait"):
                run(second + "ld.global.u32 %r4, [%d3];", programmatic=True)
        else:
            run(second + COPY_A_TO_B, threads=64, programmatic=True)
            assert run.b.tolist() == list(range(64))


# ---- what instructions compute ----------------------------------------------------------------------------------------

RNG = np.random.default_rng(15)


def any_floats(count: int) -> np.ndarray:
    """All exponents; and every 50th a special one."""
    x = RNG.integers(0, 1 << 32, count, np.uint32).view(np.float32).copy()
    x[::50] = RNG.choice(np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, 2**-149, 448, 464], np.float32), len(x[::50]))
    return x


def test_fma_rounds_once() -> None:
    a, b = (any_floats(4000) for _ in range(2))
    with np.errstate(all="ignore"):
        near = (-a.astype(np.float64) * b * RNG.uniform(0.9, 1.1, 4000)).astype(np.float32)
        c = np.where(RNG.random(4000) < 0.5, any_floats(4000), near)
        nearest, down = floats.fma_rn(a, b, c), floats.fma_rm(a, b, c)
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)).tolist():
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if abs(exact) >= Fraction(2) ** 127:
            continue
        low = np.float32(down[i])
        assert Fraction(float(low)) <= exact < Fraction(float(np.nextafter(low, np.float32(np.inf))))
        candidates = [low, np.nextafter(low, np.float32(np.inf))]
        gaps = [abs(Fraction(float(x)) - exact) for x in candidates]
        even = candidates[0].view(np.uint32) % 2
        best = candidates[gaps[1] < gaps[0] or (gaps[0] == gaps[1] and bool(even))]
        assert nearest[i] == best


def test_conversions() -> None:
    with np.errstate(all="ignore"):
        x = any_floats(20000)
        near = (RNG.standard_normal(20000) * 2.0 ** RNG.integers(-12, 12, 20000)).astype(np.float32)
        x = np.concatenate([x, near])
        t = torch.from_numpy(x)
        number = ~np.isnan(x)
        for bits, dtype in ((floats.bf16_bits(x), torch.bfloat16), (floats.f16_bits(x), torch.float16)):
            expected = t.to(dtype).view(torch.int16).numpy().view(np.uint16)
            assert np.array_equal(bits[number], expected[number])
            assert (bits[~number] == 0x7FFF).all()
        clamped = np.clip(x, -448, 448)
        expected = formats.encode_e4m3(torch.from_numpy(np.where(number, clamped, 0))).numpy()
        codes = floats.e4m3_bits(x)
        assert np.array_equal(codes[number], expected[number])
        assert (codes[~number] == 0x7F).all()
    every = np.arange(256, dtype=np.uint16)
    decoded = floats.from_f16((floats.f16_of_e4m3_pair(every) & np.uint32(0xFFFF)).astype(np.uint16))
    expected = formats.decode_e4m3(torch.arange(256).to(torch.uint8)).numpy()
    assert np.array_equal(decoded, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("shr.s32", (-8, 40), -1),
        ("shr.u32", (8, 40), 0),
        ("shl.b32", (3, 32), 0),
        ("mul.wide.s16", (-3, 5), -15),
        ("prmt.b32", (0x33221100, 0x77665544, 0x3715), 0x33771155),
        ("prmt.b32", (0x80, 0, 0x8888), 0xFFFFFFFF),
        ("shf.r.wrap.b32", (0x76543210, 0x76543210, 4), 0x07654321),
        ("bfind.shiftamt.u32", (1,), 31),
        ("bfind.shiftamt.u32", (0,), -1),
        ("brev.b32", (1,), 0x80000000),
        ("popc.b32", (0xF0F,), 8),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("cvt.s8.s32", (0x1FF,), -1),
        ("selp.b32", (1, 2, True), 1),
        ("mad.lo.s64", (-3, 5, 1), -14),
    ],
)
def test_scalars(name: str, values: Sequence[int], expected: int) -> None:
    known = scalar.SCALAR[name]
    given = [np.full(32, np.array(v).astype(scalar.DTYPES[t])) for v, t in zip(values, known.operands, strict=True)]
    text = known.expression.format(*(f"given[{i}]" for i in range(len(given))))
    with np.errstate(all="ignore"):
        result = eval(text, {**scalar.HELPERS, "given": given})
    assert result.tolist() == [np.array(expected).astype(scalar.DTYPES[known.result])] * 32


def test_exchange_instructions() -> None:
    lane = np.arange(32)
    for text, expected in [
        ("shfl.sync.up.b32 %r4|%p1, %r0, 3, 0, -1;", np.where(lane >= 3, lane - 3, lane)),
        ("shfl.sync.idx.b32 %r4|%p1, %r0, 5, 31, -1;", np.full(32, 5)),
        ("redux.sync.max.u32 %r4, %r0, -1;", np.full(32, 31)),
        ("and.b32 %r5, %r0, 3; match.any.sync.b32 %r4, %r5, -1;", np.array([0x11111111 << i % 4 for i in range(32)])),
        ("shl.b32 %r5, %r0, 16; movmatrix.sync.aligned.m8n8.trans.b16 %r4, %r5;", None),
    ]:
        out = Run()(text + "st.global.u32 [%d4], %r4;")[:32]
        if expected is None:  # lane 4g + t held (0, 4g + t) at columns 2t and 2t + 1 of row g
            matrix = np.zeros((8, 8), np.int64)
            matrix[:, 1::2] = lane.reshape(8, 4)
            expected = matrix.T[:, 0::2].reshape(-1) | matrix.T[:, 1::2].reshape(-1) << 16
        assert out.tolist() == expected.tolist(), text


def test_ldmatrix() -> None:
    """Rows of 16 bytes, row r of matrix i at the address of lane 8i + r: here in reverse order."""
    body = "".join(f"st.shared.u32 [%r3+{at}], %r{5 + i};" for i, at in enumerate(range(0, 512, 128)))
    body = "".join(f"add.s32 %r{5 + i}, %r0, {32 * i};" for i in range(4)) + body + "bar.warp.sync -1;"
    body += "sub.s32 %r9, 31, %r0; shl.b32 %r9, %r9, 4; add.s32 %r9, %r1, %r9;"
    body += "ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%r20, %r21, %r22, %r23}, [%r9];"
    for matrix in range(4):
        out = Run()(body + f"st.global.u32 [%d4], %r{20 + matrix};")[:32].reshape(8, 4)
        rows = 31 - (8 * matrix + np.arange(8))
        assert np.array_equal(out, rows[:, None] * 4 + np.arange(4))


# ---- the MMA ----------------------------------------------------------------------------------------------------------

MMA = "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.{}.{}.f32.ue8m0"


def spread(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices to registers, element by element by the ISA's maps for m16n8k32."""
    ra, rb, rc = np.zeros((4, 32, 4), np.uint8), np.zeros((2, 32, 4), np.uint8), np.zeros((4, 32), np.float32)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(16):  # a_i: row, column
            row = group if i < 4 or 8 <= i < 12 else group + 8
            column = thread * 4 + (i & 3) + (0 if i < 8 else 16)
            ra[i // 4, lane, i % 4] = a[row, column]
        for i in range(8):
            rb[i // 4, lane, i % 4] = b[group, thread * 4 + (i & 3) + (0 if i < 4 else 16)]
        for i in range(4):
            rc[i, lane] = acc[group if i < 2 else group + 8, thread * 2 + (i & 1)]
    return ra.view(np.uint32)[..., 0], rb.view(np.uint32)[..., 0], rc


@pytest.mark.parametrize("formats_", [("e4m3", "e2m1"), ("e2m1", "e4m3")])
def test_mma_places_every_operand(formats_: tuple[str, str]) -> None:
    codes = {"e4m3": lambda *s: RNG.integers(0x20, 0x50, s).astype(np.uint8), "e2m1": lambda *s: RNG.integers(0, 16, s).astype(np.uint8)}
    for byte_a, thread_a, byte_b, thread_b in [(0, 0, 0, 0), (1, 0, 2, 0), (3, 1, 1, 3), (2, 1, 0, 2)]:
        a, b = codes[formats_[0]](16, 32), codes[formats_[1]](8, 32)
        acc = RNG.standard_normal((16, 8)).astype(np.float32)
        words = RNG.integers(120, 134, (2, 32, 4)).astype(np.uint8)
        contained = [x << 2 if kind == "e2m1" else x for x, kind in zip((a, b), formats_, strict=True)]
        ra, rb, rc = spread(*contained, acc)
        queue = mma.Queue()
        # Two in a row, the second on the first's result.
        selectors = (byte_a, thread_a, byte_b, thread_b)
        scales = tuple(np.ascontiguousarray(w).view(np.uint32)[:, 0] for w in words)
        first = mma.start(queue, tuple(rc.view(np.uint32)), tuple(ra), tuple(rb), scales, selectors, formats_, "")
        second = mma.start(queue, first, tuple(ra), tuple(rb), scales, selectors, formats_, "")
        scale_a = [words[0, 4 * (row % 8) + 2 * thread_a + row // 8, byte_a] for row in range(16)]
        scale_b = [words[1, 4 * column + thread_b, byte_b] for column in range(8)]
        given = [torch.tensor(np.array(x)) for x in (a, b, scale_a, scale_b)]
        once = arithmetic.block_scaled_mma(*given, torch.from_numpy(acc), a_format=formats_[0], b_format=formats_[1])
        twice = arithmetic.block_scaled_mma(*given, once, a_format=formats_[0], b_format=formats_[1])
        for registers, expected in ((first, once), (second, twice)):
            _, _, out = spread(*contained, expected.numpy())
            assert np.array_equal(np.stack([mma.force(r) for r in registers]), out.view(np.uint32))
        assert queue.executed == 2


def test_containers() -> None:
    registers = "{%r20, %r21, %r22, %r23}, {%r24, %r25, %r26, %r27}, {%r28, %r29}, {%r20, %r21, %r22, %r23}"
    body = "".join(f"mov.b32 %r{i}, 0;" for i in range(20, 30)) + "mov.b32 %r30, 0x7F7F7F7F; {}"
    body += MMA.format("e4m3", "e2m1") + f" {registers}, %r30, {{0,0}}, %r30, {{0,0}}; st.global.u32 [%d4], %r20;"
    works(body.replace("{}", "mov.b32 %r28, 0x3C3C3C3C;", 1))
    for bits in ("0x01000000", "0x00000200", "0x00400000", "0x00000080"):
        fails(Kind.CONTAINER, body.replace("{}", f"mov.b32 %r28, {bits};", 1), "mma.sync")
    for selectors in ("{4,0}", "{0,2}"):
        fails(Kind.UNKNOWN, body.replace("{}", "", 1).replace("{0,0}", selectors, 1), "selectors")
