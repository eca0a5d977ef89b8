"""The self-test of a wheel of profile full: each pair of formats that a tile has a kernel for is asked about.

No GPU runs here: what a tile computes is the reference's, or that with a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4_moe import arithmetic, formats, pair_problems, problems, reference
from mxfp4_moe._health.selftest import checks, worker
from mxfp4_moe._install import loading, wheel
from mxfp4_moe.arithmetic import SM12X_MXF8F6F4, of_arch
from mxfp4_moe.pair_problems import PairProblem
from mxfp4_moe.problems import GemmProblem, bits
from mxfp4_moe.tiles import MXFP4_BF16, MXFP4_MXFP8, PAIRS, Tile, load_manifest

HAVING, LACKING = load_manifest().tile("m64n64"), load_manifest().tile("m256n64")
CPU = torch.device("cpu")
OTHERS = [pair for pair in PAIRS if pair not in (MXFP4_MXFP8, MXFP4_BF16)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Tiles that compute what is published, but for the faults in the dictionary that is returned."""
    faults: dict[str, Any] = {}

    def run(problem: GemmProblem, tile: Tile, dtype: torch.dtype = torch.float32) -> Tensor:
        other = isinstance(problem, PairProblem)
        if other and "operand" in faults:
            problem = faults["operand"](problem)
        rule = of_arch("120f", problem.pair) if isinstance(problem, PairProblem) else SM12X_MXF8F6F4
        given = problem.sums(replace(rule, rounding="nearest") if other and "rounds" in faults else rule)
        if other and "gemm" in faults:
            given = faults["gemm"](given)
        out = torch.full_like(problem.expected, float("nan"), dtype=dtype)
        out[: problem.valid] = given[: problem.valid].to(dtype)
        return out

    def layer(*call: Any, tile_mn: tuple[int, int], output: Tensor, **options: Any) -> None:
        kind = call[3].weight_format.value
        rule = of_arch("120f", f"{kind}_{options.get('activation_format', 'mxfp8')}")
        output.copy_(reference.fused_moe(*call, arithmetic=rule, **options))
        if options and "layer" in faults:
            output.mul_(faults["layer"])

    monkeypatch.setattr(GemmProblem, "run", run)
    monkeypatch.setattr(checks, "fused_moe", layer)
    monkeypatch.setattr(loading, "load_tile", lambda tile: None)
    monkeypatch.setattr(checks, "RANDOM", ((32, 16, False), (160, 48, True)))
    monkeypatch.setattr(checks, "SPARSE", ((96, 80),))
    monkeypatch.setattr(checks, "INTEGERS", ((640, 32),))
    monkeypatch.setattr(checks, "LAYERS", ((1, 2), (5, 3)))
    monkeypatch.setattr(problems, "ROWS_PER_EXPERT", (0, 1, 9, 20))
    return faults


def runner(*pairs: str) -> Any:
    kernels = [checks.Kernel(pair=pair, published=of_arch("120f", pair), having=[HAVING]) for pair in pairs]
    return checks.tile_runner(CPU, SM12X_MXF8F6F4, kernels)


def test_a_healthy_tile_is_asked_of_all_and_passes(device: dict[str, Any]) -> None:
    run_tile = runner(*OTHERS)
    every, one = run_tile(HAVING), run_tile(LACKING)
    assert (every.reason(), one.reason()) == ("", "")
    assert every.arithmetic.as_published
    for pair in OTHERS:
        layers = [name for name in every.digests if name.startswith(f"{pair}, the layers' output")]
        assert len(layers) == (2 if pair == "nvfp4_nvfp4" else 1), (
            "rows under the checkpoint's scales, and under their own"
        )
    assert every.digests.keys() > one.digests.keys()


def swapped_halves(problem: PairProblem) -> PairProblem:
    """Weights' words of the two halves of 64 k exchanged."""
    if problem.packed.shape[-1] < 32:
        return problem
    halves = torch.unflatten(problem.packed[..., :32], -1, (2, 16)).flip(-2).flatten(-2)
    return replace(problem, packed=torch.cat((halves, problem.packed[..., 32:]), -1))


def neighbours_scales(problem: PairProblem) -> PairProblem:
    return replace(problem, scales=problem.scales.roll(1, -1))


def other_factor(problem: PairProblem) -> PairProblem:
    assert problem.of_weights is not None
    return replace(problem, of_weights=problem.of_weights.flip(1))


def other_experts_factor(problem: PairProblem) -> PairProblem:
    assert problem.of_weights is not None
    return replace(problem, of_weights=problem.of_weights.roll(1, 0) * 2)


FAULTS: dict[str, tuple[str, Callable[..., Any], list[str]]] = {
    "words": ("operand", swapped_halves, OTHERS),
    "block scales": ("operand", neighbours_scales, OTHERS),
    "factors of gates and ups": ("operand", other_factor, ["nvfp4_nvfp4", "nvfp4_bf16", "nvfp4_fp16"]),
    "columns": ("gemm", lambda sums: sums.roll(1, 1), OTHERS),
    "sums": ("gemm", lambda sums: sums * 1.001, OTHERS),
}


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name, fault in FAULTS.items() for pair in fault[2]])
def test_a_fault_of_one_kernel_fails_the_tile(device: dict[str, Any], name: str, pair: str) -> None:
    kind, fault, _ = FAULTS[name]
    device[kind] = fault
    run_tile = runner(pair)
    assert run_tile(HAVING).reason().startswith(f"layout: {pair}, GEMM, one-hot rows")
    assert run_tile(LACKING).reason() == ""


def test_weights_that_are_relative_to_another_scale_fail_the_tile(device: dict[str, Any]) -> None:
    """What is exact stays it, so that the random problems tell: other weights are rounded."""
    device["operand"] = other_experts_factor
    assert runner("mxfp4_fp16")(HAVING).reason().startswith("accuracy: mxfp4_fp16, GEMM, K=32, N=16: beyond the bound")


@pytest.mark.parametrize("pair", OTHERS)
def test_a_fault_of_the_layer_alone(device: dict[str, Any], pair: str) -> None:
    device["layer"] = 1.05
    assert runner(pair)(HAVING).reason().startswith(f"accuracy: {pair}, layer of 1 tokens: relative error ")


@pytest.mark.parametrize("pair", OTHERS)
def test_other_last_bits_are_said_and_are_no_fault(device: dict[str, Any], pair: str) -> None:
    device["rounds"] = True
    outcome = runner(pair)(HAVING)
    assert outcome.reason() == ""
    assert outcome.arithmetic.differ > 0
    assert any("nearest" in rule for rule in outcome.arithmetic.rules)


@pytest.mark.parametrize("pair", OTHERS)
@pytest.mark.parametrize("what", ["one-hot", "sparse", "integers"])
def test_exact_problems_are_exact_under_the_rule(pair: str, what: str) -> None:
    """Expected values are float64's; the oracle is asked here, and not there."""
    problem = pair_problems.exact_problem(pair, what, 352, 48, CPU)
    for rule in (of_arch("120f", pair), of_arch("90a", pair)):
        assert torch.equal(bits(problem.sums(rule)), bits(problem.expected))
    assert problem.expected.unique().numel() > 20
    scales = [problem.scales] if problem.row_scales is None else [problem.scales, problem.row_scales]
    if pair.startswith("nvfp4"):
        for one in scales:
            assert bool((one[..., 0::2] != one[..., 1::2]).any()), "each 16 values have a scale of their own"


@pytest.mark.parametrize("pair", OTHERS)
def test_what_the_tiles_operator_is_given(pair: str) -> None:
    problem = pair_problems.random_problem(pair, 160, 80, CPU, of_arch("120f", pair))
    rows, scales = problem.act
    kind, acts = pair.split("_")
    words = {"mxfp4": 1, "nvfp4": 2}[kind]
    if acts in ("bf16", "fp16"):
        assert rows.dtype is {"bf16": torch.bfloat16, "fp16": torch.float16}[acts]
        assert scales is None
    else:
        assert scales is not None
        assert rows.shape == (len(problem.rows), 80)
        assert scales.shape == (2 * words, -(-len(rows) // 4) * 4, 4)
    assert problem.weight.shape == (len(problem.packed), formats.weight_bytes(80, 160, words))
    options = problem.options
    code = {"bf16": 1, "mxfp4": 2, "nvfp4": 3, "fp16": 4}[acts]
    assert (options["weight_format"], options["act_format"]) == (words - 1, code)
    assert (options["weight_factors"] is not None) == (kind == "nvfp4" or acts == "fp16")
    one_of_rows = [options[name] is not None for name in ("row_factors", "input_factors")]
    assert sum(one_of_rows) == (acts == "nvfp4")


@pytest.mark.parametrize(
    ("arch", "profile", "asked"),
    [
        ("90a", "mxfp4_minimal", []),
        ("90a", "full", ["nvfp4_bf16", "mxfp4_fp16", "nvfp4_fp16"]),
        ("120f", "mxfp4_minimal", []),
        ("120f", "full", ["mxfp4_bf16", *OTHERS]),
    ],
)
def test_the_worker_asks_about_every_pair_that_the_wheel_has(
    arch: str, profile: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So none is offered that is not covered: formats on a device are those whose pair has tiles there."""
    capability = (9, 0) if arch == "90a" else (12, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    properties = type("Properties", (), {"multi_processor_count": 1})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(loading, "moe_ops", lambda: None)
    monkeypatch.setattr(wheel, "built_archs", lambda: ("90a", "120f"))
    monkeypatch.setattr(wheel, "emulated_on", lambda: None)
    monkeypatch.setattr(wheel, "profile", lambda: profile)
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", "/nowhere")
    given: list[checks.Kernel] = []
    monkeypatch.setattr(checks, "tile_runner", lambda device, published, kernels: given.extend(kernels))
    worker.prepare_gpu(0)
    assert [kernel.pair for kernel in given] == asked
    for kernel in given:
        assert kernel.published == arithmetic.of_arch(arch, kernel.pair)
        assert tuple(kernel.having) == wheel.tiles_of(kernel.pair, capability)
