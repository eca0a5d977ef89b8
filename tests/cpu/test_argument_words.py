"""Every argument of the calls, of MoEWeights and of formats, given what it cannot be: its name, expected, and got."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from public_calls import CASES, Inputs
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats
from mxfp4_moe.weights import MoEWeights

BAD: dict[str, object] = {
    "bytes": b"0",
    "list": [1],
    "dtype": torch.float64,
    "object": object(),
    "meta": None,  # the tensor of the good call, without its values
}
OWNERS: dict[str, Any] = {"mxfp4_moe": mxfp4_moe, "MoEWeights": MoEWeights, "formats": formats}
# What is truth to Python (flags), and what is not this test's: choices of tiles.
LEFT_OUT = {
    ("topk_softmax", "renormalize"),
    ("fused_moe_from_logits", "renormalize"),
    ("select_tile_mn_for_sm120", "num_tokens"),
    ("get_cutlass_fused_moe_module", "backend"),
    ("get_cutlass_fused_moe_module", "use_fast_build"),  # taken, and there is nothing to build
    ("word_order_of", "device"),
    *((call, flag) for call in ("fused_moe", "fused_moe_from_logits") for flag in ("auto_tile_select",)),
    *((call, "intermediate_rounding") for call in ("fused_moe", "fused_moe_from_logits")),
    *((call, "scale_layout") for call in ("fused_moe", "fused_moe_from_logits")),  # means nothing without scales
    *((call, "order") for call in ("pack_words", "unpack_words", "arrange_weights", "restore_weights", "read_rows")),
    *((call, name) for call in ("reorder_words", "write_rows") for name in ("order", "old", "new")),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


def good_call(case: str, inputs: Inputs) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A public function and the arguments of its case."""
    owner, _, name = case.partition(".")
    function = getattr(OWNERS[owner], name)
    seen: list[inspect.BoundArguments] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(inspect.signature(function).bind(*args, **kwargs))
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OWNERS[owner], name, record)
        CASES[case](inputs)
    return function, dict(seen[0].arguments)


NAMES = [
    case
    for case in CASES
    if case.partition(".")[0] in OWNERS and case not in ("MoEWeights.to", "MoEWeights.to_mxfp4", "MoEWeights.to_nvfp4")
    if not case.startswith(("MoEWeights.expert", "MoEWeights.tensor"))
    if not case.endswith("fp16_factors")  # has no arguments
]


@pytest.mark.parametrize("case", NAMES)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(case: str, inputs: Inputs) -> None:
    function, arguments = good_call(case, inputs)
    said, wrong = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if (function.__name__, name) in LEFT_OUT:
            continue
        good = arguments.get(name, parameter.default)
        for kind, value in BAD.items():
            if kind == "meta":
                if not isinstance(good, Tensor) or case.startswith("formats"):
                    continue  # formats give shapes of meta tensors
                value = good.to("meta")
            try:
                function(**arguments | {name: value})
            except (TypeError, ValueError) as error:
                words = str(error)
                # Of tensors that must be in one place, which is wrong is anyone's guess.
                named = f"{name}:" in words or (kind == "meta" and " on meta" in words)
                if not named and name == "hidden_states_scale":
                    named = words.startswith("hidden_states: expected uint8")  # which is what goes with scales
                if not (named and "expected" in words and "got" in words):
                    wrong.append(f"{name}={kind}: {words}")
                said.append(words)
            except Exception as error:
                wrong.append(f"{name}={kind}: {type(error).__name__}: {error}")
            else:
                wrong.append(f"{name}={kind}: was taken")
    assert wrong == []


def test_devices_that_are_none(inputs: Inputs) -> None:
    for value in (torch.float16, None, b"cpu", 1.5, ["cpu"], True):
        with pytest.raises(TypeError, match=r"^device: expected a torch\.device, its name or a GPU's number, got "):
            inputs.weights.to(value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^device: expected a torch\.device"):
            MoEWeights.from_safetensors(inputs.path, layer=0, device=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^device: expected a device such as 'cpu', 'cuda' or 'cuda:0', got 'gpu'$"):
        inputs.weights.to("gpu")


@pytest.mark.parametrize("layer", ["0", None, b"0", 0.0, True, [0]])
def test_layers_that_are_none(layer: Any, inputs: Inputs) -> None:
    for load in (MoEWeights.from_pretrained, MoEWeights.from_safetensors):
        with pytest.raises(TypeError, match=r"^layer: expected an integer, got "):
            load(inputs.path, layer=layer)


@pytest.mark.parametrize("path", [None, b"model", 3, ["model"]])
def test_paths_that_are_none(path: Any) -> None:
    for load in (MoEWeights.from_pretrained, MoEWeights.from_safetensors):
        with pytest.raises(TypeError, match=r"^path: expected a str or a path, got "):
            load(path, layer=0)


def test_an_empty_path_is_not_the_current_directory(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs.path.parent)
    for load in (MoEWeights.from_pretrained, MoEWeights.from_safetensors, mxfp4_moe.load_router):
        with pytest.raises(ValueError, match=r"^path: expected a file or directory, got ''; '\.' is the current"):
            load("", layer=0)
