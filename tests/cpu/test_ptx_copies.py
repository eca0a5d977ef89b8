"""mbarriers and tensor copies in the PTX executor: what they do, and each mistake that must be reported."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ptx.faults import Fault, Kind
from ptx.tensor_copy import MAGIC
from ptx.tiny import SEEDS, Run

ZERO = "setp.eq.s32 %p1, %r0, 0; setp.ne.s32 %p3, %r0, 0; add.s32 %r10, %r1, 1024;"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r10], 1;"
FENCE = "@%p1 fence.mbarrier_init.release.cluster;"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], %r11;"
COPY = (
    "mov.b64 %d8, map; cvta.param.u64 %d9, %d8; mov.b32 %r12, 0; mov.b32 %r13, ROW;"
    "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    " [%r1], [%d9, {%r12, %r13}], [%r10];"
)


def wait(parity: int = 0) -> str:
    tried = f"mbarrier.try_wait.parity.shared::cta.b64 done, [%r10], {parity};"
    return f"{{ .reg .pred done; again: {tried} @!done bra again; }}"


def tensor_map(
    address: int, *, rows: int = 4, box: tuple[int, int] = (16, 4), kind: int = 3, swizzle: int = 0
) -> bytes:
    """Words, 16 to a row."""
    words = struct.pack(
        "<QIIQ5Q4Q5IHHHH", MAGIC, kind, 2, address, 16, rows, 0, 0, 0, 64, 0, 0, 0, *box, 0, 0, 0, 0, swizzle, 0, 0
    )
    return words + bytes(4)


def copies(
    body: str,
    *,
    seed: int = 0,
    lateness: float | None = None,
    row: int = 0,
    threads: int = 64,
    bytes_: int = 256,
    **map_: object,
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
    body += "".join(f"ld.shared.u32 %r4, [%r3+{at}]; st.global.u32 [%d4+{at}], %r4;" for at in range(0, 2048, 128))
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
        (
            {Kind.BARRIER, Kind.COPY},
            SETUP + COPY + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];" + wait(),
            "block 0 exits",
        ),
        (
            {Kind.UNWRITTEN, Kind.RACE},
            SETUP + COPY + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];" + wait() + TO_B,
            "",
        ),
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
EMPTY = f"@%p3 bra skip; {wait().replace('%r10', '%r14').replace('again', 'more')} skip:"


def ring(sync: str = "bar.warp.sync -1;", empty: str = EMPTY) -> str:
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


PLAIN_FIRST = INIT + FENCE + "st.shared.u32 [%r3], %r0; {} bar.sync 0;"


def test_a_copy_after_plain_writes_needs_a_proxy_fence() -> None:
    for seed in SEEDS:
        with pytest.raises(Fault, match="no fence.proxy.async after a write"):
            copies(PLAIN_FIRST.format("") + EXPECT + COPY + wait(), seed=seed)
        copies(PLAIN_FIRST.format("fence.proxy.async.shared::cta;") + EXPECT + COPY + wait(), seed=seed)
