"""The drop-in's arguments of another type, and inputs of no rows: a sentence or a result, never torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mxfp4_moe import flashinfer_api as fi

BF16 = torch.bfloat16
E, H, I = 2, 128, 128  # noqa: E741  (the formulas' names)


def nvfp4_call(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)

    def words(n: int, k: int) -> torch.Tensor:
        return torch.randint(0, 256, (E, n, k // 2), dtype=torch.uint8, generator=g).view(torch.int64)

    def scales(n: int, k: int) -> torch.Tensor:
        return torch.randint(0x28, 0x50, (E, n, k // 16), dtype=torch.uint8, generator=g).view(torch.int32)

    ones, whole = torch.ones(E), torch.tensor(0.5)
    call = {
        "input": torch.randn(3, H, generator=g).to(BF16),
        "token_selected_experts": torch.zeros(3, 1, dtype=torch.int32),
        "token_final_scales": torch.ones(3, 1),
        "fc1_expert_weights": words(2 * I, H),
        "fc2_expert_weights": words(H, I),
        "output_dtype": BF16,
        "quant_scales": [whole, scales(2 * I, H), ones, whole, scales(H, I), ones],
    }
    return call | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"quant_scales": 5}, TypeError, "quant_scales: expected a list or a tuple, got int"),
        ({"quant_scales": torch.ones(6)}, TypeError, "quant_scales: expected a list or a tuple, got Tensor"),
        ({"profile_ids": 5}, TypeError, "profile_ids: expected a list or a tuple, got int"),
        ({"activation_type": True}, ValueError, "activation_type: expected an ActivationType, got True"),
        ({"tp_size": 0}, ValueError, "tp_size: expected 1 or more ranks, got 0"),
        ({"ep_size": -1}, ValueError, "ep_size: expected 1 or more ranks, got -1"),
        (
            {"input": torch.zeros(3, H)},
            TypeError,
            r"input: expected torch.bfloat16, .* for NVFP4 x NVFP4, .* got torch.float32",
        ),
    ],
)
def test_calls(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    fi.cutlass_fused_moe(**nvfp4_call())
    with pytest.raises(error, match=f"^{words}"):
        fi.cutlass_fused_moe(**nvfp4_call(**changes))


@pytest.mark.parametrize(
    ("factors", "act_factors", "came"), [(1e-30, 1e-20, "0"), (1e30, 1e20, "inf"), (1e-20, 1e-19, "1e-39")]
)
@pytest.mark.parametrize("gemm", [1, 2])
def test_factors_whose_product_float32_does_not_hold(gemm: int, factors: float, act_factors: float, came: str) -> None:
    """Each of them may be given, and what is computed with is their product and its reciprocal."""
    call = nvfp4_call()
    act, own = (0, 2) if gemm == 1 else (3, 5)
    call["quant_scales"][act], call["quant_scales"][own] = torch.tensor(act_factors), torch.full((E,), factors)
    with pytest.raises(
        ValueError, match=rf"^quant_scales\[{own}\] \* quant_scales\[{act}\]: expected .*, got {came} for"
    ):
        fi.cutlass_fused_moe(**call)


QUANTIZERS: dict[str, Any] = {
    "nvfp4_quantize": lambda x, **named: fi.nvfp4_quantize(x, 1.0, **named),
    "fp4_quantize": lambda x, **named: fi.fp4_quantize(x, torch.tensor(1.0)),
    "mxfp4_quantize": lambda x, **named: fi.mxfp4_quantize(x, **named),
    "fp4_quantize of MXFP4": lambda x, **named: fi.fp4_quantize(x, None, 32, True),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (2, 0, 64)])
def test_no_rows(name: str, shape: tuple[int, ...]) -> None:
    packed, scales = QUANTIZERS[name](torch.zeros(shape, dtype=BF16))
    assert packed.shape == (*shape[:-1], 32)
    assert scales.shape == (0, 4)


@pytest.mark.parametrize("name", ["nvfp4_quantize", "mxfp4_quantize"])
def test_a_layout_is_no_bool(name: str) -> None:
    with pytest.raises(ValueError, match="^sfLayout: expected an SfLayout, got True$"):
        QUANTIZERS[name](torch.zeros(2, 64, dtype=BF16), sfLayout=True)
