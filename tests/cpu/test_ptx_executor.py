"""The PTX executor itself: tiny kernels, each with one mistake that it must report, and the same without the mistake.

Memory, races, barriers, lanes, grids; test_ptx_copies.py: mbarriers and tensor copies.
"""

from __future__ import annotations

import numpy as np
import pytest
from ptx.faults import Fault, Kind
from ptx.tiny import SEEDS, Run, fails, works

# ---- memory ----------------------------------------------------------------------------------------------------------

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


# ---- races -----------------------------------------------------------------------------------------------------------

OTHER_WARP = "xor.b32 %r5, %r3, 128; "  # the word of the same lane in the other warp
OTHER_LANE = "xor.b32 %r5, %r3, 4; "


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (SHARED + OTHER_WARP + "ld.shared.u32 %r4, [%r5];", ""),
        (SHARED + OTHER_LANE + "ld.shared.u32 %r4, [%r5];", "read of shared memory"),
        (SHARED + "bar.sync 0;" + OTHER_WARP + "ld.shared.u32 %r4, [%r5];" + SHARED, "not ordered after the"),
        (
            SHARED + "bar.warp.sync -1;" + OTHER_LANE + "ld.shared.u32 %r4, [%r5];" + SHARED,
            "not ordered after the read",
        ),
        ("st.shared.u32 [%r1], %r0;", "two lanes"),
        ("st.global.u32 [%d1], %r0;", "two lanes"),
        (
            "setp.eq.s32 %p1, %r0, 0; @%p1 st.global.u32 [%d1], %r0;"
            "setp.eq.s32 %p2, %r0, 33; @%p2 st.global.u32 [%d1], %r0;",
            "",
        ),
        (
            "ld.global.u32 %r4, [%d0]; bar.sync 0; setp.eq.s32 %p1, %r0, 0; @%p1 st.global.u32 [%d0], %r0;",
            "several threads",
        ),
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


# ---- other barriers, and lanes ---------------------------------------------------------------------------------------


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


# ---- grids one behind the other --------------------------------------------------------------------------------------

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
