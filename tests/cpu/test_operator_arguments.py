"""What reaches the layer's operator, under which name."""

from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import INTER, E, H, K, T, make_call, make_weights
from nvfp4_cases import random_nvfp4
from torch import Tensor

from mxfp4_moe import Router
from mxfp4_moe._call import fused_moe, launch, operators, selection
from mxfp4_moe._call.selection import select
from mxfp4_moe._install import loading
from mxfp4_moe.formats import WeightFormat
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights


def per_expert_weights() -> MoEWeights:
    """A slice, with numbers for each expert and without a limit."""
    alpha, beta = torch.linspace(1, 2, E), torch.linspace(0, 1, E)
    weights = make_weights(bias=False, alpha=alpha, beta=beta, limit=None)
    return replace(weights, first_expert=E, num_global_experts=3 * E)


# What a call without a router, or with topk_softmax's, leaves to the operator.
NO_ROUTER = {
    **{"e_score_correction_bias": None, "scoring_func": 0, "num_expert_group": 1, "topk_group": 1},
    **{"group_score": 0, "routed_scaling_factor": 1.0},
}
ROUTERS = [
    None,
    Router(top_k=3, renormalize=False),
    Router(
        top_k=3,
        scoring_func="sqrtsoftplus",
        e_score_correction_bias=torch.zeros(E),
        num_expert_group=2,
        topk_group=2,
        group_score="max",
        routed_scaling_factor=2.5,
    ),
]


def of_router(router: Router | None) -> dict[str, Any]:
    if router is None or router.is_topk_softmax:
        return {"renormalize": router is None or router.renormalize, **NO_ROUTER}
    numbers = {"num_expert_group": 2, "topk_group": 2, "group_score": 1, "routed_scaling_factor": 2.5}
    return {
        **{"renormalize": True, "e_score_correction_bias": router.e_score_correction_bias, "scoring_func": 2},
        **numbers,
    }


# What a call with MXFP4 weights leaves to the operator.
NO_NVFP4 = {
    "weight_format": 0,
    **{f"{name}_factors": None for name in ("w13", "w2", "w13_input", "w2_input")},
    **{f"{name}_input_global_scales": None for name in ("w13", "w2")},
}

OPERATORS = Path(__file__).parents[2] / "csrc" / "moe" / "operators.cpp"


def layer_schema() -> torch._C.FunctionSchema:
    """The operator's schema as operators.cpp has it; the extension itself does not load without CUDA."""
    (text,) = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)*"fused_moe\((?:[^"]*"\s*")*[^"]*")\)', OPERATORS.read_text())
    return torch._C.parse_schema("mxfp4_moe::" + "".join(re.findall(r'"([^"]*)"', text)))


class Recorder:
    """Stands for the operator, and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        operator = lambda *args, **named: self.calls.append((args, named))  # noqa: E731
        monkeypatch.setattr(launch, "layer_operator", lambda index, tile, among=None: (operator, tile))
        monkeypatch.setattr(launch, "tiles_of", lambda activation_format, index, kind: loading.manifest().tiles)

    def arguments(self) -> dict[str, Any]:
        """Of the one call, by the schema's names and with its defaults."""
        ((args, named),) = self.calls
        schema = layer_schema().arguments
        rest = {a.name: a.has_default_value() for a in schema[len(args) :]}
        assert named.keys() <= rest.keys()
        assert all(rest[name] for name in rest.keys() - named.keys()), "nothing else may be left out"
        defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        return defaults | dict(zip((a.name for a in schema), args, strict=False)) | named


def same(given: object, expected: object) -> bool:
    return given is expected or (not isinstance(given, Tensor) and given == expected)


@pytest.mark.parametrize("scale_layout", [None, "linear", "swizzled"])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("weights", [make_weights(), per_expert_weights()], ids=["plain", "rare"])
@pytest.mark.parametrize("router", ROUTERS, ids=["ids", "softmax", "all"])
def test_every_argument_reaches_the_operator_under_its_name(
    monkeypatch: pytest.MonkeyPatch,
    router: Router | None,
    weights: MoEWeights,
    rounding: bool,
    scale_layout: str | None,
) -> None:
    """The call is by position, and an argument that has its default is left out."""
    hidden_states = torch.zeros(T, H, dtype=torch.bfloat16 if scale_layout is None else torch.uint8)
    scale = None if scale_layout is None else torch.zeros(T, H // 32, dtype=torch.uint8)
    topk_weights, topk_ids, logits, output = torch.zeros(4, 1).unbind()
    routing = (topk_weights, topk_ids, None, 0) if router is None else (None, None, logits, 3)
    recorder = Recorder(monkeypatch)
    launch.run(
        tile=Tile(m=8, n=128, swap_ab=True),
        hidden_states=hidden_states,
        hidden_states_scale=scale,
        scale_layout=scale_layout or "linear",
        routing=routing,
        weights=weights,
        output=output,
        intermediate_rounding=rounding,
        router=router,
    )
    got = recorder.arguments()
    assert got.pop("hidden_states").data_ptr() == hidden_states.data_ptr()
    rare = weights.first_expert > 0
    expected = {
        "hidden_states_scale": scale,
        "scale_is_swizzled": scale_layout == "swizzled",
        **dict(zip(("topk_weights", "topk_ids", "router_logits", "top_k"), routing, strict=True)),
        **of_router(router),
        "first_expert": weights.first_expert,
        "intermediate_size": INTER,
        **{name: getattr(weights, name) for name in ("w13", "w13_bias", "w2", "w2_bias")},
        "activation": weights.activation.code,
        **({"alpha": 0.0, "beta": 0.0, "limit": math.inf} if rare else {"alpha": 1.702, "beta": 1.0, "limit": 7.0}),
        **({"alphas": weights.alpha, "betas": weights.beta} if rare else {"alphas": None, "betas": None}),
        "limits": None,
        **{"tile_m": 8, "tile_n": 128, "out": output, "intermediate_rounding": rounding, "activation_format": 0},
        **NO_NVFP4,
    }
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not same(got[name], value)] == []


@pytest.mark.parametrize("per_expert", [False, True])
def test_a_compiled_call_hands_the_operator_the_same(monkeypatch: pytest.MonkeyPatch, per_expert: bool) -> None:
    recorder, weights, call = Recorder(monkeypatch), make_weights(), make_call()
    numbers = {"alpha": 1.5, "beta": 0.5, "limit": None if per_expert else 7.0}
    each = {f"{name}s": torch.full((E,), 2.0) if per_expert else None for name in numbers}
    own = {name: getattr(weights, name) for name in ("w13", "w13_bias", "w2", "w2_bias", "intermediate_size")}
    arguments = operators.LayerCall(
        *(call[name] for name in ("hidden_states", "topk_weights", "topk_ids")),
        **own,
        **numbers,
        **each,
        hidden_size=H,
        word_order=weights.word_order.value,
        activation="swiglu_oai",
        hidden_states_scale=None,
        scale_layout="linear",
        output_dtype=torch.float16,
        intermediate_rounding=True,
        activation_format="bf16",
    )
    operators._moe_layer_cuda(*arguments)
    got = recorder.arguments()
    out = got.pop("out")
    assert (out.dtype, out.shape) == (torch.float16, (T, H))
    tile = select(T, K, E, H, INTER, None)
    expected = {
        **{name: call[name] for name in ("hidden_states", "topk_weights", "topk_ids")},
        **{"router_logits": None, "top_k": 0, "renormalize": True, "first_expert": 0, **NO_ROUTER},
        **{"activation": weights.activation.code, "tile_m": tile.m, "tile_n": tile.n},
        **own,
        **numbers,
        **({"limit": math.inf} if per_expert else {}),
        **each,
        **{"hidden_states_scale": None, "scale_is_swizzled": False, "intermediate_rounding": True},
        "activation_format": 1,
        **NO_NVFP4,
    }
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not same(got[name], value)] == []


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize(("name", "number"), [("bf16", 1), ("mxfp4", 2), ("nvfp4", 3), ("fp16", 4)])
def test_the_activation_format_reaches_the_operator_as_its_number(
    monkeypatch: pytest.MonkeyPatch, from_logits: bool, name: str, number: int
) -> None:
    """csrc/moe/kernels.h: 0 is MXFP8, the default."""
    hidden_states, output = torch.zeros(2, T, H, dtype=torch.bfloat16).unbind()
    recorder = Recorder(monkeypatch)
    launch.run(
        Tile.from_mn((8, 128)),
        hidden_states,
        None,
        "linear",
        (None, None, output, 3) if from_logits else (output, output, None, 0),
        make_weights(),
        output,
        False,
        activation_format=name,
    )
    assert recorder.arguments()["activation_format"] == number
    source = (OPERATORS.parent / "kernels.h").read_text()
    assert "enum class ActivationFormat : int { kMxfp8, kBf16, kMxfp4, kNvfp4, kFp16 };" in source


@pytest.mark.parametrize("inputs", [False, True])
def test_nvfp4_weights_bring_their_scales(monkeypatch: pytest.MonkeyPatch, inputs: bool) -> None:
    layer = random_nvfp4(hidden=64, inter=32, inputs=inputs)
    weights = MoEWeights.from_nvfp4(**layer)
    hidden_states, output = torch.zeros(2, T, 64, dtype=torch.bfloat16).unbind()
    recorder = Recorder(monkeypatch)
    routing = (output, output, None, 0)
    tile = Tile.from_mn((8, 128))
    launch.run(tile, hidden_states, None, "linear", routing, weights, output, False, activation_format="nvfp4")
    got = recorder.arguments()
    assert (got["weight_format"], got["activation_format"]) == (1, 3)
    assert got["w13"] is weights.w13
    for name in NO_NVFP4.keys() - {"weight_format"}:
        assert (got[name] is not None) == (inputs or "input" not in name), name
    assert torch.equal(got["w13_factors"], layer["w13_scale_2"])


@pytest.mark.parametrize("activation_format", ["nvfp4", "bf16", "fp16"])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("kind", ["multiply", "divide"])
def test_a_compiled_call_of_nvfp4_weights_hands_the_operator_what_an_eager_one_does(
    monkeypatch: pytest.MonkeyPatch, kind: str, inputs: bool, activation_format: str
) -> None:
    weights = MoEWeights.from_nvfp4(**random_nvfp4(kind, hidden=64, inter=32, inputs=inputs))
    half = torch.float16 if activation_format == "fp16" else torch.bfloat16
    x, topk_weights, topk_ids = torch.zeros(T, 64, dtype=half), torch.zeros(T, K), torch.zeros(T, K, dtype=torch.int32)
    tile, asked = Tile.from_mn((8, 128)), []

    def choose(*arguments: object) -> Tile:
        asked.append(arguments)
        return tile

    monkeypatch.setattr(selection, "select", choose)
    monkeypatch.setattr(operators, "select", choose)
    selection.tile_of_call(None, True, T, K, weights, torch.device("cpu"), activation_format)
    eager = Recorder(monkeypatch)
    routing = (topk_weights, topk_ids, None, 0)
    launch.run(tile, x, None, "linear", routing, weights, x, False, activation_format=activation_format)
    expected = eager.arguments()
    operands: list[tuple[object, ...]] = []
    monkeypatch.setattr(operators, "moe_layer", lambda *arguments: operands.append(arguments) or arguments[0])
    fused_moe._traced(x, topk_weights, topk_ids, weights, None, "linear", half, False, activation_format)
    compiled = Recorder(monkeypatch)
    operators._moe_layer_cuda(*operands[0])
    got = compiled.arguments()
    assert (got.pop("out").dtype, expected.pop("out").dtype) == (half, half)
    assert [name for name, value in expected.items() if not same(got[name], value)] == []
    assert asked == [(T, K, 3, 64, 32, None, activation_format, WeightFormat.NVFP4)] * 2


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_compiled_call_of_a_part_chooses_its_tile_as_an_eager_one(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """By the experts of the whole layer: a rank gets its share of the rows, not all of them."""
    Recorder(monkeypatch)
    part, call = make_weights().expert_parallel(0, ranks), make_call()
    asked: list[tuple[object, ...]] = []

    def remember(*arguments: object) -> Tile:
        asked.append(arguments)
        return Tile.from_mn((8, 128))

    monkeypatch.setattr(selection, "select", remember)
    monkeypatch.setattr(operators, "select", remember)
    selection.tile_of_call(None, True, T, K, part, torch.device("cpu"))
    operands: list[tuple[object, ...]] = []
    monkeypatch.setattr(operators, "moe_layer", lambda *arguments: operands.append(arguments) or arguments[0])
    tensors = (call[name] for name in ("hidden_states", "topk_weights", "topk_ids"))
    fused_moe._traced(*tensors, part, None, "linear", torch.bfloat16, False, "mxfp8")
    operators._moe_layer_cuda(*operands[0])
    assert asked == [(T, K, E, H, INTER, None, "mxfp8", WeightFormat.MXFP4)] * 2


def test_copies_of_weights_gather_their_own_arguments() -> None:
    """A copy that kept the original's would compute with the original's tensors."""
    weights = per_expert_weights()
    before = weights.operator_arguments
    assert weights.operator_arguments is before
    for copied in (
        copy.deepcopy(weights),
        pickle.loads(pickle.dumps(weights)),
        replace(weights, w2=weights.w2.clone()),
    ):
        arguments, rare = copied.operator_arguments
        assert arguments[0] is copied.w13
        assert arguments[2] is copied.w2
        assert rare["alphas"] is copied.alpha
        assert torch.equal(copied.w2, weights.w2)
        assert copied.w2 is not weights.w2
