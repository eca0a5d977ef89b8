"""Who may start early, by a model of every order of events: the layer as it is, broken rules, finalize reading first.

That each kernel keeps the rule of csrc/shared/launch.cuh is what the PTX executor checks (test_ptx_moe.py,
test_ptx_tiles.py); here is what follows from it for calls one behind the other, whose memory the allocator hands out
again at once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest
from dependent_launch import Kernel, Op, after, kernel, read, search, trigger, wait, write

Change = Callable[[list[Kernel]], list[Kernel]]


def aliases(one: str, other: str) -> bool:
    """A call's workspace may be any memory of another call's workspace, or output, but for outputs that are kept."""
    if one == other:
        return True
    (call, name), (other_call, other_name) = one.split("."), other.split(".")
    return call != other_call and "out" not in (name if call < other_call else other_name)


def layer(call: int, *, activation_kernel: bool = False, finalize: str = "in order") -> list[Kernel]:
    """The kernels of a call as csrc/moe/layer.cpp launches them; its hidden states are the output of the call before.

    GEMM2 writes where GEMM1 read. The GEMMs' first warp produces, the others multiply and store.
    """
    routing, rows, rows2, sums, out = (f"{call}.{name}" for name in ("routing", "rows", "rows2", "sums", "out"))
    hidden = f"{call - 1}.out"
    store = sums if activation_kernel else rows2
    known = [read(routing)] if finalize == "reads first" else []
    kernels = [
        kernel("route", (wait, trigger, read(hidden), write(routing))),  # ids or logits, as old as hidden states
        kernel("quantize", (read(hidden), wait, trigger, read(routing), write(rows))),
        kernel("GEMM1", (read(routing), wait, trigger, read(rows)), (wait, read(routing), after, write(store))),
        kernel("activation", (wait, trigger, read(sums), write(rows2))),
        kernel("GEMM2", (read(routing), wait, trigger, read(rows2)), (wait, read(routing), after, write(rows))),
        kernel("finalize", (read(routing), read(rows), write(out)), early=False)
        if finalize == "in order"
        else kernel("finalize", (*known, wait, trigger, read(routing), read(rows), write(out))),
    ]
    return [one for one in kernels if activation_kernel or one.name != "activation"]


def stream(change: Change = list, *, finalizes: Sequence[str] = (), **options: bool | str) -> list[Kernel]:
    """A caller's kernel that does not know of early starts, then three calls; `finalizes`: how each ends."""
    caller = kernel("caller's", (write("0.out"),), early=False)
    each = [{**options, "finalize": finalize} for finalize in finalizes] or [options] * 3
    return [caller, *(one for call in (1, 2, 3) for one in change(layer(call, **each[call - 1])))]  # type: ignore[arg-type]


@pytest.mark.parametrize("finalizes", list(itertools.product(("in order", "waits first"), repeat=3)), ids="-".join)
@pytest.mark.parametrize("activation_kernel", [False, True])
def test_the_layer_is_safe(activation_kernel: bool, finalizes: Sequence[str]) -> None:
    """finalize waits first in calls of few tokens, and starts in order in others."""
    found = search(stream(activation_kernel=activation_kernel, finalizes=finalizes), aliases)
    assert found.fault == ""
    assert found.states > 3_000


@pytest.mark.parametrize("finalize", ["waits first", "reads first"])
@pytest.mark.parametrize("activation_kernel", [False, True])
def test_finalize_could_start_early(finalize: str, activation_kernel: bool) -> None:
    """By what the ISA promises. What a GPU did is in docs/decisions.md."""
    assert search(stream(finalize=finalize, activation_kernel=activation_kernel), aliases).fault == ""


def changed(name: str, edit: Callable[[Op], list[Op]]) -> Change:
    """Replaces operations of one kernel of each call."""

    def change(kernels: list[Kernel]) -> list[Kernel]:
        blocks = {
            one.name: tuple(
                tuple(tuple(op for old in warp for op in edit(old)) for warp in block) for block in one.blocks
            )
            for one in kernels
        }
        return [dataclasses.replace(one, blocks=blocks[one.name]) if one.name == name else one for one in kernels]

    return change


def never(which: Op) -> Callable[[Op], list[Op]]:
    return lambda op: [] if op == which else [op]


def swapped(op: Op) -> list[Op]:
    """Lets the next kernel start, then waits."""
    return {wait: [trigger], trigger: [wait]}.get(op, [op])


BROKEN = {
    "route lets quantize start before it waits": (changed("route", swapped), "quantize: read 0.out, which caller's"),
    "quantize lets GEMM1 start before it waits": (changed("quantize", swapped), "GEMM1: read 1.routing, which route"),
    "quantize never waits": (changed("quantize", never(wait)), "quantize: read 1.routing, which route"),
    "GEMM2's stores do not wait for its producer": (
        changed("GEMM2", lambda op: [] if op in (wait, after) else [op]),
        "has yet to",
    ),
    "route reads before it waits": (
        changed("route", lambda op: [read("0.out"), op] if op == wait else [op]),
        "route: read 0.out, which caller's has yet to write",
    ),
    "quantize writes before it waits": (
        changed("quantize", lambda op: [write("1.rows"), op] if op == wait else [op]),
        "quantize: write 1.rows, which",
    ),
    "GEMM1 reads rows before it waits": (
        changed("GEMM1", lambda op: [read("1.rows"), op] if op == wait else [op]),
        "GEMM1: read 1.rows, which quantize has yet to write",
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule: str) -> None:
    change, words = BROKEN[rule]
    assert words in search(stream(change), aliases).fault


def test_finalize_early_must_wait_for_what_gemm2_writes() -> None:
    for edit in (never(wait), lambda op: [read("1.rows"), op] if op == wait else [op]):
        found = search(stream(changed("finalize", edit), finalize="waits first"), aliases)
        assert found.fault == "finalize: read 1.rows, which GEMM2 has yet to write"


def test_a_warp_that_is_ordered_behind_one_that_waited_need_not_wait() -> None:
    """That is how GEMMs once were, whose early finalize failed on a GPU: not by this."""

    def producer_alone(kernels: list[Kernel]) -> list[Kernel]:
        def of(block: tuple[tuple[Op, ...], ...]) -> tuple[tuple[Op, ...], ...]:
            return (block[0], *(tuple(op for op in warp if op != wait) for warp in block[1:]))

        return [dataclasses.replace(one, blocks=tuple(map(of, one.blocks))) for one in kernels]

    assert search(stream(producer_alone, finalize="reads first"), aliases).fault == ""


def test_what_is_asked_of_callers_that_start_kernels_early() -> None:
    """Hidden states are two kernels old. The one between may let ours start when it likes, but somewhere it waits."""
    writer = kernel("writer", (write("0.out"),), early=False)
    layers = stream()[1:]
    assert search([writer, kernel("between", (trigger, wait)), *layers], aliases).fault == ""
    found = search([writer, kernel("between", (trigger,)), *layers], aliases)
    assert found.fault.endswith("0.out, which writer has yet to write")


def test_a_block_that_leaves_early_lets_the_next_kernel_start() -> None:
    """One block without work is no fault, as long as another waits; a grid of them is."""
    work = (wait, trigger, write("1.b"))
    reader = kernel("reader", (read("1.a"), wait, trigger, read("1.b")))
    writer = kernel("writer", (write("1.a"),), early=False)
    middle = Kernel("middle", (((),), (work,)))
    assert search([writer, middle, reader]).fault == ""
    nobody = Kernel("nobody", (((),), ((trigger,),)))
    assert search([writer, nobody, reader]).fault == "reader: read 1.a, which writer has yet to write"


def test_a_wait_that_nothing_ends_is_found() -> None:
    first = kernel("first", (after, write("1.a")), blocks=1)
    assert search([first, kernel("second", (wait,))]).fault == "nothing can go on"
