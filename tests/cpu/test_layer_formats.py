"""What the layer's operator says of formats that it cannot compute: csrc/moe/layer.cpp, run without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nvfp4_cases import random_nvfp4
from ptx import launch
from torch import Tensor

from mxfp4_moe import formats
from mxfp4_moe.problems import random_weights
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights

TILE = Tile(m=8, n=64, swap_ab=True)
EXPERTS, HIDDEN, INTER, TOKENS = 4, 64, 32, 3
MXFP8, BF16, MXFP4, NVFP4, FP16 = range(5)  # csrc/moe/kernels.h, ActivationFormat


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[launch.Recorder]:
    """One of its own, whose layer knows one kernel: of MXFP4 rows."""
    one = launch.Recorder(tmp_path_factory.mktemp("recorder"), *launch.tools())
    one.register_kernel(TILE, "mxfp4_mxfp4")
    yield one
    one.close()


def weights_of(kind: str) -> MoEWeights:
    if kind == "mxfp4":
        return random_weights(EXPERTS, HIDDEN, INTER, torch.device("cpu"))
    return MoEWeights.from_nvfp4(**random_nvfp4(experts=EXPERTS, hidden=HIDDEN, inter=INTER))


def refusal(recorder: launch.Recorder, kind: str, activation_format: int, **changes: Any) -> str:
    """The operator's own words; changes: of arguments by name, None for one that is left out."""
    (w13, w13_bias, w2, w2_bias, *numbers), rare = weights_of(kind).operator_arguments
    ids = torch.zeros(TOKENS, 2, dtype=torch.int32)
    out = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    hidden = changes.pop("hidden_states", torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16))
    routing = (torch.zeros(TOKENS, 2), ids, None, 0)
    options = {name: value for name, value in (rare | changes).items() if value is not None}
    with pytest.raises(launch.RefusedError) as refused:
        recorder.operator(
            "fused_moe",
            *(hidden, *routing, w13, w13_bias, w2, w2_bias, *numbers, TILE.m, TILE.n, out),
            activation_format=activation_format,
            **options,
        )
    return str(refused.value)


@pytest.mark.parametrize(
    ("kind", "activation_format", "given"),
    [
        ("mxfp4", MXFP8, "mxfp4_mxfp8"),
        ("mxfp4", BF16, "mxfp4_bf16"),
        ("mxfp4", NVFP4, "mxfp4_nvfp4"),
        ("nvfp4", NVFP4, "nvfp4_nvfp4"),
        ("nvfp4", BF16, "nvfp4_bf16"),
        ("nvfp4", MXFP4, "nvfp4_mxfp4"),
    ],
)
def test_a_pair_that_the_tile_has_no_kernel_for(
    recorder: launch.Recorder, kind: str, activation_format: int, given: str
) -> None:
    words = refusal(recorder, kind, activation_format)
    assert "activation_format: expected one for which tile (8, 64) has a kernel with these weights" in words
    assert f"(it has mxfp4_mxfp4), got {given}" in words


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("kind", "activation_format", "changes", "words"),
    [
        ("mxfp4", 5, {}, "activation_format: expected 0 to 4, got 5"),
        ("mxfp4", FP16, {}, "w13_factors: expected a tensor with these formats of weights and activations, got none"),
        ("mxfp4", FP16, {"w13_factors": ones(EXPERTS, 2)}, "w2_factors: expected a tensor with these formats"),
        ("mxfp4", MXFP4, {"weight_format": 2}, "weight_format: expected 0 to 1, got 2"),
        ("mxfp4", MXFP4, {"weight_format": 1}, "w13: expected uint8 [4, "),
        ("mxfp4", MXFP4, {"w13_factors": ones(EXPERTS, 2)}, "w13_factors: expected none with these formats"),
        ("nvfp4", NVFP4, {"w2_factors": None}, "w2_factors: expected a tensor with these formats"),
        ("nvfp4", NVFP4, {"w13_factors": ones(EXPERTS)}, "w13_factors: expected float32 [4, 2], got float32 [4]"),
        ("nvfp4", NVFP4, {"w2_input_factors": None}, "w2_input_factors: expected a tensor with these formats"),
        ("nvfp4", NVFP4, {"w13_input_factors": None}, "w2_input_factors: expected none with these formats"),
        ("nvfp4", NVFP4, {"w2_input_global_scales": ones(2)}, "w2_input_global_scales: expected float32 [4], got"),
    ],
)
def test_arguments_that_do_not_fit_the_formats(
    recorder: launch.Recorder, kind: str, activation_format: int, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(recorder, kind, activation_format, **changes)


def test_mxfp8_hidden_states_stay_it(recorder: launch.Recorder) -> None:
    codes, scales = formats.quantize_mxfp8(torch.randn(TOKENS, HIDDEN))
    words = refusal(recorder, "mxfp4", MXFP4, hidden_states=codes, hidden_states_scale=scales)
    assert "activation_format: expected mxfp8 for hidden_states that are MXFP8 already, got mxfp4" in words
