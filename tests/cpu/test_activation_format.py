"""activation_format: which a device has, what it computes on CPU tensors, and what is refused in which words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from layers import INTER, E, H, T, make_call
from moe_cases import layer_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mxfp4_moe
from mxfp4_moe import formats, problems, reference
from mxfp4_moe._call import activation_format, operators
from mxfp4_moe._call.activation_format import check_format_on
from mxfp4_moe._call.checks import check_word_order
from mxfp4_moe._call.selection import tile_of_call
from mxfp4_moe._install import wheel
from mxfp4_moe.arithmetic import SM90_BF16
from mxfp4_moe.formats import WeightFormat, weight_layout
from mxfp4_moe.integrations._engines.activations import formats_on
from mxfp4_moe.weights import MoEWeights

ROOT = Path(__file__).resolve().parents[2]
GPUS = {0: (9, 0), 1: (12, 0), 2: (12, 1), 3: (8, 9)}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Four of them, and a wheel for SM90 and SM12x."""

    def forget() -> None:
        activation_format._formats_of.cache_clear()
        activation_format.tiles_of.cache_clear()
        weight_layout._order_of.cache_clear()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: GPUS[getattr(device, "index", device)])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(wheel, "built_archs", lambda: ("90a", "120f"))
    monkeypatch.setattr(wheel, "emulated_on", lambda: None)
    monkeypatch.setattr(wheel, "profile", lambda: "mxfp4_minimal")
    forget()
    yield monkeypatch
    forget()


def test_formats_of_devices(gpus: pytest.MonkeyPatch) -> None:
    every, quantized = ("mxfp8", "bf16", "mxfp4"), ("mxfp8",)
    found = [mxfp4_moe.activation_formats(index) for index in GPUS]
    assert found == [every, quantized, quantized, ()]
    assert mxfp4_moe.activation_formats("cuda:0") == every
    assert mxfp4_moe.activation_formats(torch.device("cuda")) == quantized, "the current one"
    assert mxfp4_moe.activation_formats("cpu") == (*every, "fp16")
    assert mxfp4_moe.activation_formats("meta") == ()
    assert mxfp4_moe.activation_formats("cpu", "nvfp4") == ("nvfp4", "bf16", "fp16")
    assert mxfp4_moe.activation_formats("cuda:0", "nvfp4") == mxfp4_moe.activation_formats("cuda:1", "nvfp4") == ()
    with pytest.raises(ValueError, match="weight_format: expected one of 'mxfp4', 'nvfp4', got 'int4'"):
        mxfp4_moe.activation_formats("cpu", "int4")


def test_a_build_that_emulates_sm12x_reads_what_sm12x_reads(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(wheel, "built_archs", lambda: ("120f",))
    gpus.setattr(wheel, "emulated_on", lambda: "90a")
    assert mxfp4_moe.activation_formats(0) == ("mxfp8",)


def test_a_gpu_that_reads_mxfp8_refuses_bf16_in_one_sentence(gpus: pytest.MonkeyPatch) -> None:
    for index in GPUS:
        check_format_on("mxfp8", torch.device("cuda", index))
    for name in ("bf16", "mxfp4"):
        check_format_on(name, torch.device("cuda", 0))
    check_format_on("bf16", torch.device("cuda", 3))  # whose launch says that there are no kernels at all
    with pytest.raises(ValueError, match="^activation_format: expected 'mxfp8', which is what the kernels for cuda:1"):
        check_format_on("bf16", torch.device("cuda", 1))
    for name in ("bf16", "mxfp4"):
        sentence = f"read, got '{name}': .* install a wheel built with MXFP4_MOE_BUILD_PROFILE=full; SM90 GPUs and CPU"
        with pytest.raises(ValueError, match=sentence):
            check_format_on(name, torch.device("cuda", 2))


def test_the_names_are_those_that_some_device_has() -> None:
    having = {name for kind in WeightFormat for name in kind.activations}
    assert set(weight_layout.ACTIVATION_NAMES) == having >= set(reference.ACTIVATION_FORMATS)
    header = (ROOT / "csrc" / "moe" / "kernels.h").read_text()
    [codes] = re.findall(r"enum class ActivationFormat : int \{ (.*?) \}", header)
    names = [name.removeprefix("k").lower() for name in codes.split(", ")]
    assert [activation_format.code_of(name) for name in names] == list(range(len(weight_layout.ACTIVATION_NAMES)))
    for name in weight_layout.ACTIVATION_NAMES:
        assert formats.word_order_of(torch.device("cpu"), name) is formats.WordOrder.CONTAINERS
    with pytest.raises(ValueError, match="^activation_format: expected 'mxfp8', .* or 'fp16', got 'bf61'$"):
        formats.word_order_of(torch.device("cpu"), "bf61")


# ---- a wheel of profile full -----------------------------------------------------------------------------------------


@pytest.fixture
def full(gpus: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    gpus.setattr(wheel, "profile", lambda: "full")
    return gpus


@pytest.mark.usefixtures("full")
def test_a_full_wheel_has_all_on_sm12x_too() -> None:
    every, of_nvfp4 = ("mxfp8", "bf16", "mxfp4", "fp16"), ("nvfp4", "bf16", "fp16")
    assert [mxfp4_moe.activation_formats(index) for index in GPUS] == [every] * 3 + [()]
    assert [mxfp4_moe.activation_formats(index, "nvfp4") for index in GPUS] == [of_nvfp4] * 3 + [()]
    for index in GPUS:
        for kind in formats.WeightFormat:
            for name in ("bf16", "fp16", kind.value):
                check_format_on(name, torch.device("cuda", index), kind)
    having = {index: activation_format.tiles_of("bf16", index) for index in GPUS}
    assert [len(having[index]) for index in GPUS] == [26, 21, 21, 0]
    assert all(tile.m < 256 for tile in having[1])
    having = {index: activation_format.tiles_of("mxfp4", index) for index in GPUS}
    assert [len(having[index]) for index in GPUS] == [26, 26, 26, 0]
    for kind, name, sm90, sm12x in (
        *(("nvfp4", "nvfp4", 26, 26), ("nvfp4", "bf16", 26, 20)),  # SM90 has one kernel for both
        *(("nvfp4", "fp16", 20, 20), ("mxfp4", "fp16", 21, 21)),
    ):
        having = {index: activation_format.tiles_of(name, index, formats.WeightFormat(kind)) for index in GPUS}
        assert [len(having[index]) for index in GPUS] == [sm90, sm12x, sm12x, 0]


def test_a_build_that_emulates_with_both(full: pytest.MonkeyPatch) -> None:
    full.setattr(wheel, "built_archs", lambda: ("120f",))
    full.setattr(wheel, "emulated_on", lambda: "90a")
    assert mxfp4_moe.activation_formats(0) == ("mxfp8", "bf16", "mxfp4", "fp16")
    for name in ("bf16", "fp16"):
        assert formats.word_order_of(torch.device("cuda", 0), name) is formats.WordOrder.PAIRS


@pytest.mark.usefixtures("full")
def test_weights_must_be_in_the_word_order_of_the_activations() -> None:
    containers, pairs, plain = formats.WordOrder
    sm90, sm12x = torch.device("cuda", 0), torch.device("cuda", 1)
    for name in ("mxfp8", "bf16", "mxfp4", "fp16"):
        check_word_order(pairs, sm90, name)
    check_word_order(pairs, sm90, "nvfp4", formats.WeightFormat.NVFP4)
    check_word_order(pairs, sm12x, "fp16")
    check_word_order(containers, sm12x)
    check_word_order(pairs, sm12x, "bf16")
    check_word_order(plain, sm12x, "mxfp4")
    check_word_order(plain, sm12x, "nvfp4", formats.WeightFormat.NVFP4)
    with pytest.raises(ValueError, match=r"'plain' .* 'mxfp4', got 'pairs'; .*activation_format='mxfp4'\) converts"):
        check_word_order(pairs, sm12x, "mxfp4")
    with pytest.raises(
        ValueError, match=r"^weights: expected word order 'pairs' on cuda:1 for activation_format 'bf16'"
    ):
        check_word_order(containers, sm12x, "bf16")
    with pytest.raises(ValueError, match=r"weights.to\('cuda:1', activation_format='bf16'\) converts them$"):
        check_word_order(containers, sm12x, "bf16")
    with pytest.raises(ValueError, match=r"'containers' on cuda:1, got 'pairs' of another .*weights.to\('cuda:1'\)"):
        check_word_order(pairs, sm12x)


def test_a_wheel_without_fp16_says_so_and_what_takes_float16_too(gpus: pytest.MonkeyPatch) -> None:
    other = "; activation_format 'bf16' takes float16 hidden_states too$"
    having = "'mxfp8' or 'bf16' or 'mxfp4'"
    sentence = f"expected {having}, which .* cuda:0 read, got 'fp16': .*MXFP4_MOE_BUILD_PROFILE=full" + other
    with pytest.raises(ValueError, match=sentence):
        check_format_on("fp16", torch.device("cuda", 0))
    with pytest.raises(ValueError, match="expected 'mxfp8', which .*BUILD_PROFILE=full; CPU tensors take it$"):
        check_format_on("fp16", torch.device("cuda", 1))


def test_a_wheel_without_it_says_so_before_it_speaks_of_weights(gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="MXFP4_MOE_BUILD_PROFILE=full"):
        check_word_order(formats.WordOrder.CONTAINERS, torch.device("cuda", 1), "bf16")


@pytest.mark.usefixtures("full")
def test_engines_are_offered_what_the_wheel_has() -> None:
    assert [formats_on(torch.device("cuda", index)) for index in (0, 1)] == [("mxfp8", "bf16", "mxfp4", "fp16")] * 2


def test_engines_are_not_offered_what_the_wheel_lacks(gpus: pytest.MonkeyPatch) -> None:
    assert [formats_on(torch.device("cuda", index)) for index in (0, 1)] == [("mxfp8", "bf16", "mxfp4"), ("mxfp8",)]


@pytest.mark.usefixtures("full")
def test_a_named_tile_must_have_a_kernel_for_the_activations() -> None:
    weights = layer_of(4, 64, "swiglu", "one for all", bias=False, device=torch.device("cpu"))
    rest = (True, 4, 2, weights)
    for index, name in ((0, "bf16"), (1, "mxfp8")):
        assert tile_of_call((256, 64), *rest, torch.device("cuda", index), name).mn == (256, 64)
    assert tile_of_call((128, 64), *rest, torch.device("cuda", 1), "bf16").mn == (128, 64)
    with pytest.raises(
        ValueError, match=r"^tile_mn: expected a tile with a kernel for .* on cuda:1 \(.*\), got \(256, 64"
    ):
        tile_of_call((256, 64), *rest, torch.device("cuda", 1), "bf16")


@pytest.mark.usefixtures("gpus")
def test_weights_go_to_a_device_in_the_word_order_of_the_activations() -> None:
    """On the CPU there is one order, whatever the activations; the reference reads either."""
    weights = layer_of(4, 64, "swiglu", "one for all", bias=False, device=torch.device("cpu"))
    assert weights.to("cpu", activation_format="bf16").word_order is formats.WordOrder.CONTAINERS


CALLS = {
    "fused_moe": lambda call, **named: mxfp4_moe.fused_moe(**call, **named),
    "from_logits": lambda call, **named: mxfp4_moe.fused_moe_from_logits(
        call["hidden_states"], torch.zeros(T, E), 2, call["weights"], **named
    ),
    "module": lambda call, **named: mxfp4_moe.get_cutlass_fused_moe_module(tile_mn=(8, 128)).fused_moe(**call, **named),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("fp8", "expected 'mxfp8', 'bf16', 'mxfp4', 'nvfp4' or 'fp16', got 'fp8'$"),
        ("nvfp4", "expected 'mxfp8' or 'bf16' or 'mxfp4' or 'fp16' with mxfp4 weights, got 'nvfp4'; without one a"),
    ],
)
def test_other_formats_are_refused(name: str, given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^activation_format: {words}"):
        CALLS[name](make_call(), activation_format=given)


def test_mxfp8_hidden_states_stay_mxfp8() -> None:
    call = make_call()
    codes, scales = formats.quantize_mxfp8(call["hidden_states"])
    call |= {"hidden_states": codes, "hidden_states_scale": scales}
    given = "activation_format: expected 'mxfp8' for hidden_states that are MXFP8"
    with pytest.raises(ValueError, match=f"^{given} already, got 'bf16'; pass bfloat16 or float16"):
        mxfp4_moe.fused_moe(**call, activation_format="bf16")
    with pytest.raises(ValueError, match=f"^{given}, got 'bf16'"):
        reference.fused_moe(**call, activation_format="bf16")
    with pytest.raises(
        ValueError, match="^activation_format: expected 'mxfp8' or 'bf16' or 'mxfp4' or 'fp16' with mxfp4 weights"
    ):
        reference.fused_moe(**make_call(), activation_format="nvfp4")


# ---- what is computed ------------------------------------------------------------------------------------------------


def exact_layer(call: dict[str, Any], checkpoint: dict[str, torch.Tensor], *, rounds: bool) -> torch.Tensor:
    """In float64, token by token; `rounds` to bfloat16 what the GEMMs read."""

    def brain(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().double() if rounds else x.double()

    w13 = torch.from_numpy(oracles.mxfp4_values(checkpoint["w13"].numpy(), checkpoint["w13_scale"].numpy()))
    w2 = torch.from_numpy(oracles.mxfp4_values(checkpoint["w2"].numpy(), checkpoint["w2_scale"].numpy()))
    out = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for weight, e in zip(call["topk_weights"][t].double(), call["topk_ids"][t].tolist(), strict=True):
            sums = w13[e] @ brain(call["hidden_states"][t]) + checkpoint["w13_bias"][e].double()
            gate, up = sums[0::2].clamp(max=7.0), sums[1::2].clamp(-7.0, 7.0)
            middle = brain(gate / (1 + (-1.702 * gate).exp()) * (up + 1.0))
            out[t] += weight * (w2[e] @ middle + checkpoint["w2_bias"][e].double())
    return out


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    return oracles.random_checkpoint(E, H, INTER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bf16_rounds_what_gemms_read_and_nothing_else(dtype: torch.dtype, checkpoint: dict[str, torch.Tensor]) -> None:
    call = make_call() | {"weights": MoEWeights.from_mxfp4(**checkpoint)}
    call["hidden_states"] = (torch.randn(T, H, generator=torch.Generator().manual_seed(3)) * 1.001).to(dtype)
    out = mxfp4_moe.fused_moe(**call, activation_format="bf16", output_dtype=torch.bfloat16).double()
    expected = exact_layer(call, checkpoint, rounds=True)
    off = float((out - expected).norm() / expected.norm())
    assert off < 2.5e-3, "GEMM2's rows and the sum are bfloat16 too"
    exact = exact_layer(call, checkpoint, rounds=False)
    quantized = mxfp4_moe.fused_moe(**call, output_dtype=torch.bfloat16).double()
    errors = [float((given - exact).norm() / exact.norm()) for given in (out, quantized)]
    assert errors[0] < 4e-3
    assert errors[1] > 8 * errors[0], "otherwise it would be of no use"


def test_float16_hidden_states_are_rounded_to_bfloat16() -> None:
    call = make_call()
    call["hidden_states"] = (torch.randn(T, H, generator=torch.Generator().manual_seed(1)) * 1.01).half()
    assert not torch.equal(call["hidden_states"].float(), call["hidden_states"].bfloat16().float())
    out = mxfp4_moe.fused_moe(**call, activation_format="bf16")
    assert out.dtype is torch.float16
    call["hidden_states"] = call["hidden_states"].bfloat16()
    assert torch.equal(mxfp4_moe.fused_moe(**call, activation_format="bf16", output_dtype=torch.float16), out)


@pytest.mark.parametrize("rounding", [False, True])
def test_the_steps_one_by_one(rounding: bool) -> None:
    """The public call is the reference's steps: bfloat16 rows, SM90's rule, float32 between, bfloat16 again."""
    call = make_call()
    weights, tokens, ids = call["weights"], call["hidden_states"], call["topk_ids"]
    packed = weights.to_mxfp4()
    prepared = [
        [formats.restore_weights(one, n, k, weights.word_order) for one in matrix]
        for matrix, n, k in ((weights.w13, 2 * INTER, H), (weights.w2, H, INTER))
    ]
    (w13, w13_scale), (w2, w2_scale) = ((torch.stack(part) for part in zip(*one, strict=True)) for one in prepared)
    assert torch.equal(w2, packed.w2)
    offsets, row_slot, slot_row = reference.route(ids, E)
    row_slot = row_slot[: int(offsets[-1])]
    row_expert = torch.repeat_interleave(torch.arange(E), offsets.diff())
    rows = tokens[row_slot // ids.shape[1]].bfloat16()
    sums = reference.grouped_gemm(rows, None, w13, w13_scale, offsets, arithmetic=SM90_BF16)
    middle = reference.activate(
        sums, row_expert, weights.w13_bias, "swiglu_oai", rounding=torch.bfloat16 if rounding else None
    )
    out = reference.grouped_gemm(middle.bfloat16(), None, w2, w2_scale, offsets, arithmetic=SM90_BF16)
    expected = reference.finalize(out.bfloat16(), call["topk_weights"], slot_row, row_expert, weights.w2_bias)
    given = mxfp4_moe.fused_moe(**call, activation_format="bf16", intermediate_rounding=rounding)
    assert torch.equal(given, expected)


def test_every_way_to_the_layer_gives_the_same() -> None:
    call = make_call()
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(2))
    call["topk_weights"], call["topk_ids"] = mxfp4_moe.topk_softmax(logits, 2)
    expected = mxfp4_moe.fused_moe(**call, activation_format="bf16")
    assert not torch.equal(expected, mxfp4_moe.fused_moe(**call))
    from_logits = mxfp4_moe.fused_moe_from_logits(
        call["hidden_states"], logits, 2, call["weights"], activation_format="bf16"
    )
    assert torch.equal(from_logits, expected)
    assert torch.equal(CALLS["module"](call, activation_format="bf16"), expected)
    output = torch.empty_like(expected)
    assert mxfp4_moe.fused_moe(**call, activation_format="bf16", output=output) is output
    assert torch.equal(output, expected)
    assert torch.equal(operators.moe_layer(*layer_call(call, "bf16")), expected)
    assert torch.equal(operators.moe_layer(*layer_call(call, "mxfp8")), mxfp4_moe.fused_moe(**call))


def layer_call(call: dict[str, Any], name: str) -> operators.LayerCall:
    weights = call["weights"]
    own = ("w13", "w13_bias", "w2", "w2_bias", "hidden_size", "intermediate_size", "alpha", "beta", "limit")
    return operators.LayerCall(
        **{key: call[key] for key in ("hidden_states", "topk_weights", "topk_ids")},
        **{key: getattr(weights, key) for key in own},
        word_order=weights.word_order.value,
        activation=weights.activation.value,
        alphas=None,
        betas=None,
        limits=None,
        hidden_states_scale=None,
        scale_layout="linear",
        output_dtype=torch.bfloat16,
        activation_format=name,
    )


def test_graphs_see_the_format_and_its_refusals() -> None:
    call = layer_call(make_call(), "bf16")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in call]
        assert operators.moe_layer(*fake).shape == (T, H)
        fake[operators.LayerCall._fields.index("activation_format")] = "fp8"
        with pytest.raises(ValueError, match="^activation_format: expected 'mxfp8', .*, got 'fp8'"):
            operators.moe_layer(*fake)
    tensors = [x for x in call if isinstance(x, torch.Tensor)]

    def run(*given: torch.Tensor) -> torch.Tensor:
        rest = iter(given)
        result: torch.Tensor = operators.moe_layer(*(next(rest) if isinstance(x, torch.Tensor) else x for x in call))
        return result

    traced = make_fx(run, tracing_mode="fake")(*tensors)
    (node,) = (node for node in traced.graph.nodes if "moe_layer" in str(node.target))
    assert node.args[-1] == "bf16"
    assert torch.equal(traced(*tensors), operators.moe_layer(*call))


def test_nan_and_infinity_stay_in_their_token() -> None:
    call = make_call()
    clean = mxfp4_moe.fused_moe(**call, activation_format="bf16")
    for poison in (float("nan"), float("inf")):
        spoiled = call["hidden_states"].clone()
        spoiled[2, 5] = poison
        out = mxfp4_moe.fused_moe(**call | {"hidden_states": spoiled}, activation_format="bf16")
        others = torch.arange(T) != 2
        assert torch.equal(out[others], clean[others])
        assert not torch.equal(out[2], clean[2])
        assert poison == float("inf") or out[2].isnan().all()


def test_a_token_alone_has_the_same_bits() -> None:
    weights = problems.random_weights(4, 96, 64, torch.device("cpu"))
    call = problems.random_call(9, 2, weights)
    whole = mxfp4_moe.fused_moe(*call.args(), weights, activation_format="bf16")
    for t in range(9):
        alone = mxfp4_moe.fused_moe(*call.token(t).args(), weights, activation_format="bf16")
        assert torch.equal(alone[0], whole[t])
