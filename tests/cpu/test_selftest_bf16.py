"""The self-test of a wheel that has kernels of their own for bf16 activations: they are asked as the others are.

No GPU runs here: what a tile computes is the reference's, or that with a fault.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4_moe import problems, reference
from mxfp4_moe._health.selftest import checks, parent
from mxfp4_moe._health.selftest.report import Arithmetic, Status, TileResult
from mxfp4_moe._install import loading
from mxfp4_moe.arithmetic import SM12X_BF16, SM12X_MXF8F6F4
from mxfp4_moe.problems import GemmProblem
from mxfp4_moe.tiles import MXFP4_BF16, Tile, load_manifest

HAVING, LACKING = load_manifest().tile("m64n64"), load_manifest().tile("m256n64")
CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Tiles that compute what is published, but for the faults in the dictionary that is returned."""
    faults: dict[str, Any] = {}

    def run(problem: GemmProblem, tile: Tile, dtype: torch.dtype = torch.float32) -> Tensor:
        in_bf16 = problem.row_scales is None
        rule = SM12X_BF16 if in_bf16 else SM12X_MXF8F6F4
        given = reference.grouped_gemm(*problem.operands, arithmetic=rule)
        if in_bf16 and faults.get("gemm"):
            given = faults["gemm"](given)
        out = torch.full_like(problem.expected, float("nan"), dtype=dtype)
        out[: problem.valid] = given[: problem.valid].to(dtype)
        return out

    def layer(*call: Any, tile_mn: tuple[int, int], output: Tensor, **options: Any) -> None:
        rule = SM12X_BF16 if options else SM12X_MXF8F6F4
        output.copy_(reference.fused_moe(*call, arithmetic=rule, **options))
        if options and faults.get("layer"):
            output.mul_(1.02)

    monkeypatch.setattr(GemmProblem, "run", run)
    monkeypatch.setattr(checks, "fused_moe", layer)
    monkeypatch.setattr(loading, "load_tile", lambda tile: None)
    monkeypatch.setattr(checks, "RANDOM", ((32, 16, False), (160, 48, True)))
    monkeypatch.setattr(checks, "SPARSE", ((96, 80),))
    monkeypatch.setattr(checks, "INTEGERS", ((640, 32),))
    monkeypatch.setattr(checks, "LAYERS", ((1, 2), (5, 3)))
    monkeypatch.setattr(problems, "ROWS_PER_EXPERT", (0, 1, 9, 20))
    return faults


def runner() -> Any:
    kernel = checks.Kernel(pair=MXFP4_BF16, published=SM12X_BF16, having=[HAVING])
    return checks.tile_runner(CPU, SM12X_MXF8F6F4, [kernel])


def test_a_healthy_tile_is_asked_of_both_and_passes(device: dict[str, Any]) -> None:
    run_tile = runner()
    both, one = run_tile(HAVING), run_tile(LACKING)
    assert (both.reason(), one.reason()) == ("", "")
    assert both.arithmetic == Arithmetic(values=2 * one.arithmetic.values)
    assert both.checks == 2 * one.checks
    in_bf16 = {name for name in both.digests if name.startswith("bf16 activations, ")}
    assert len(in_bf16) == len(one.digests) == len(both.digests) - len(in_bf16)
    assert all(both.digests[name] == digest for name, digest in one.digests.items())


@pytest.mark.parametrize(
    ("fault", "question"),
    [
        ({"gemm": lambda sums: sums.roll(1, 1)}, "layout: bf16 activations, GEMM, one-hot rows"),
        ({"gemm": lambda sums: sums * 1.001}, "layout: bf16 activations, GEMM, one-hot rows"),
        ({"layer": True}, "accuracy: bf16 activations, layer of 1 tokens"),
    ],
)
def test_a_fault_of_that_kernel_alone_fails_the_tile(
    device: dict[str, Any], fault: dict[str, Any], question: str
) -> None:
    device.update(fault)
    run_tile = runner()
    assert run_tile(HAVING).reason().startswith(question)
    assert run_tile(LACKING).reason() == ""


def test_other_last_bits_are_said_and_are_no_fault(device: dict[str, Any]) -> None:
    def last_bit(sums: Tensor) -> Tensor:
        """Where a sum has low bits to lose, so that exact ones stay."""
        low = sums.view(torch.int32) & 1
        return (sums.view(torch.int32) - low).view(torch.float32)

    device["gemm"] = last_bit
    outcome = runner()(HAVING)
    assert outcome.reason() == ""
    assert outcome.arithmetic.differ > 0


def test_tiles_agree_with_those_that_were_asked_the_same() -> None:
    def result(tile: Tile, **digests: str) -> TileResult:
        return TileResult(tile=tile, status=Status.PASSED, digests=digests)

    a, b, c, d = load_manifest().tiles[:4]
    asked = [result(a, mxfp8="1", bf16="2"), result(b, mxfp8="1"), result(c, mxfp8="1"), result(d, mxfp8="1")]
    assert all(one.status is Status.PASSED for one in parent.agree(asked)), "three were not asked of bf16"
    asked[1:3] = [result(b, mxfp8="1", bf16="3"), result(c, mxfp8="1", bf16="2")]
    assert [one.status is Status.FAILED for one in parent.agree(asked)] == [False, True, False, False]
