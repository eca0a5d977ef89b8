"""FlashInfer's NVFP4 names: quantizers and their layouts, and the six quant_scales of its MoE call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fp4_oracles
import numpy as np
import oracles
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe._call import operators
from mxfp4_moe.flashinfer_api import SfLayout, modes

BF16 = torch.bfloat16


def offset(layout: SfLayout, row: int, block: int, blocks: int) -> int:
    """Byte of a scale, from the layouts' definitions."""
    if layout is SfLayout.layout_linear:
        return row * blocks + block
    columns = -(-blocks // 4)
    if layout is SfLayout.layout_8x4:
        return (row // 8 * columns + block // 4) * 32 + row % 8 * 4 + block % 4
    return oracles.scale_offset(row, block, 32 * blocks)


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (130, 80), (128, 128)])
def test_bytes_in_every_layout(layout: SfLayout, dtype: torch.dtype, rows: int, k: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
    scale = (448 * 6) / x.float().abs().max()
    packed, scales = fi.nvfp4_quantize(x, scale, layout)
    expected = fp4_oracles.nvfp4_quantize(x.float().numpy(), np.full(rows, scale.numpy()))
    assert np.array_equal(packed.numpy(), expected[0])
    height = {SfLayout.layout_linear: 1, SfLayout.layout_8x4: 8, SfLayout.layout_128x4: 128}[layout]
    columns = k // 16 if layout is SfLayout.layout_linear else -(-k // 64) * 4
    assert scales.shape == (-(-rows // height) * height, columns)
    flat, left = scales.flatten().clone(), 0
    for r in range(rows):
        for c in range(k // 16):
            assert flat[offset(layout, r, c, k // 16)] == expected[1][r, c]
            flat[offset(layout, r, c, k // 16)] = 0
            left += 1
    assert not flat.any(), "padding is zero"
    if layout is SfLayout.layout_128x4:
        linear = fi.nvfp4_quantize(x, scale, SfLayout.layout_linear)[1]
        assert torch.equal(fi.nvfp4_block_scale_interleave(linear), scales.flatten())


@pytest.mark.parametrize(("swizzled", "short"), [(True, False), (True, True), (False, False)])
def test_fp4_quantize_is_nvfp4(swizzled: bool, short: bool) -> None:
    x = torch.randn(130, 160, generator=torch.Generator().manual_seed(0)).to(BF16)
    layout = SfLayout.layout_linear if not swizzled else SfLayout.layout_8x4 if short else SfLayout.layout_128x4
    scale = torch.tensor([64.0])
    packed, scales = fi.nvfp4_quantize(x, 64.0, layout)
    for found in (
        fi.fp4_quantize(x, scale, 16, False, swizzled, short),
        fi.fp4_quantize(x, scale.to(BF16), is_sf_swizzled_layout=swizzled, is_sf_8x4_layout=short, nvfp4_4over6=None),
        fi.fp4_quantize(x, 1 / scale, 16, False, swizzled, short, is_global_scale_inversed=True),
    ):
        assert torch.equal(found[0], packed)
        assert torch.equal(found[1], scales)
    columns = fi.fp4_quantize(x.contiguous().T, scale, 16, False, swizzled, short)
    assert torch.equal(columns[0], packed.T)
    assert torch.equal(columns[1], scales.T)
    one = fi.fp4_quantize(x, None, 16, False, swizzled, short)
    assert torch.equal(one[1], fi.nvfp4_quantize(x, 1.0, layout)[1])
    three = fi.nvfp4_quantize(x.view(2, 65, 160), scale, layout)
    assert three[0].shape == (2, 65, 80)
    assert torch.equal(three[1], scales)


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=BF16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: fi.nvfp4_quantize(half(2, 40), 1.0),
            ValueError,
            r"a: expected \[\.\.\., M, K\] with K a multiple of 16",
        ),
        (lambda: fi.nvfp4_quantize(half(16), 1.0), ValueError, r"a: expected \[\.\.\., M, K\]"),
        (lambda: fi.nvfp4_quantize(torch.ones(2, 16), 1.0), TypeError, "a: expected bfloat16 or float16"),
        (lambda: fi.nvfp4_quantize(half(2, 16), "1"), TypeError, "a_global_sf: expected a number or a tensor with"),
        (lambda: fi.nvfp4_quantize(half(2, 16), torch.ones(2)), ValueError, "a_global_sf: expected one number, got"),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 0.0),
            ValueError,
            "a_global_sf: expected a finite number above 0, got 0",
        ),
        (lambda: fi.nvfp4_quantize(half(2, 16), math.nan), ValueError, "a_global_sf: expected a finite number above 0"),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, 7), ValueError, "sfLayout: expected an SfLayout, got 7"),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, do_shuffle=True), NotImplementedError, "do_shuffle: this library"),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, sf_vec_size=32), NotImplementedError, "sf_vec_size: this library"),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 1.0, per_token_activation=True),
            NotImplementedError,
            "per_token_activation: this library's quantizer has no global scales of tokens",
        ),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, out_scale=torch.ones(1)), NotImplementedError, "out_scale: this"),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 1.0, nvfp4_4over6=1),
            NotImplementedError,
            "nvfp4_4over6: this library",
        ),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 1.0, backend="cake"),
            ValueError,
            "backend: expected 'cuda' or 'cute-d",
        ),
        (lambda: fi.fp4_quantize(half(2, 16), torch.ones(2)), ValueError, "global_scale: expected one number"),
        (lambda: fi.fp4_quantize(half(2, 24), torch.ones(1)), ValueError, "input: expected .* multiple of 16"),
        (lambda: fi.fp4_quantize(half(2, 16), nvfp4_4over6=1), NotImplementedError, "nvfp4_4over6: this library"),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# ---- the layer -------------------------------------------------------------------------------------------------------

E, T, K, H, I = 3, 8, 2, 128, 256  # noqa: E741  (the formulas' names)


def nvfp4_call(*, each: bool = False, dtype: torch.dtype = BF16, gated: bool = True) -> tuple[dict[str, Any], Any]:
    """A call as FlashInfer's tests make it, and (token row, expert) -> its output in float64, rounded as FlashInfer."""
    g = torch.Generator().manual_seed(int(each))
    width = 2 * I if gated else I
    weights = {"fc1": torch.randn(E, width, H, generator=g) / 8, "fc2": torch.randn(E, H, I, generator=g) / 12}
    act = {"fc1": 2688 / torch.tensor(4.1), "fc2": 2688 / torch.tensor(9.7)}
    if each:
        act = {name: scale * (0.7 + 0.5 * torch.rand(E, generator=g)) for name, scale in act.items()}
    packed, blocks, alphas, values = {}, {}, {}, {}
    for name, weight in weights.items():
        own = 2688 / weight.abs().amax((1, 2))
        made = [fi.nvfp4_quantize(w.to(BF16), scale) for w, scale in zip(weight, own, strict=True)]
        linear = [fi.nvfp4_quantize(w.to(BF16), s, SfLayout.layout_linear)[1] for w, s in zip(weight, own, strict=True)]
        packed[name] = torch.stack([codes for codes, _ in made])
        blocks[name] = torch.stack([scales for _, scales in made])
        alphas[name] = 1 / (act[name] * own)
        values[name] = fp4_oracles.nvfp4_values(packed[name].numpy(), torch.stack(linear).numpy())
    call = {
        "input": torch.randn(T, H, generator=g).to(dtype),
        "token_selected_experts": torch.randint(0, E, (T, K), generator=g, dtype=torch.int32),
        "token_final_scales": torch.rand(T, K, generator=g),
        "fc1_expert_weights": packed["fc1"].view(torch.int64),
        "fc2_expert_weights": packed["fc2"].view(torch.int64),
        "output_dtype": dtype,
        "quant_scales": [
            *(act["fc1"], blocks["fc1"].view(torch.int32), alphas["fc1"]),
            *(act["fc2"], blocks["fc2"].view(torch.int32), alphas["fc2"]),
        ],
        "activation_type": fi.ActivationType.Swiglu if gated else fi.ActivationType.Relu2,
    }

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(dtype).double().numpy()

    def gemm(name: str, x: np.ndarray, e: int) -> np.ndarray:
        scale = act[name].expand(E)[e : e + 1].numpy()
        read = fp4_oracles.nvfp4_values(*fp4_oracles.nvfp4_quantize(x.astype(np.float32)[None], scale))[0]
        return rounded(values[name][e] @ read * float(alphas[name][e]))

    def expert(x: np.ndarray, e: int) -> np.ndarray:
        sums = gemm("fc1", x, e)
        if gated:
            up, gate = sums[:I], sums[I:]
            middle = gate / (1 + np.exp(-gate)) * up
        else:
            middle = np.maximum(sums, 0) ** 2
        return gemm("fc2", rounded(middle), e)

    return call, expert


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("each", [False, True], ids=["one scale of inputs", "one for each expert"])
def test_six_quant_scales(each: bool, dtype: torch.dtype, gated: bool) -> None:
    call, expert = nvfp4_call(each=each, dtype=dtype, gated=gated)
    (out,) = fi.cutlass_fused_moe(**call)
    assert out.dtype is dtype
    expected = np.zeros((T, H))
    for t in range(T):
        chosen = zip(call["token_selected_experts"][t].tolist(), call["token_final_scales"][t].tolist(), strict=True)
        expected[t] = sum(weight * expert(call["input"][t].double().numpy(), e) for e, weight in chosen)

    def error(result: torch.Tensor) -> float:
        return float(np.linalg.norm(result.double().numpy() - expected) / np.linalg.norm(expected))

    # Sums that are rounded to the output dtype on two sides of a middle, and codes after them, now and then.
    assert error(out) < 1.5e-2
    for i in (2, 3, 5):
        scales = list(call["quant_scales"])
        scales[i] = scales[i] * 1.5
        assert error(fi.cutlass_fused_moe(**call | {"quant_scales": scales})[0]) > 3e-2, i
    scales = list(call["quant_scales"])
    scales[0] = scales[0] * 0.6
    assert error(fi.cutlass_fused_moe(**call | {"quant_scales": scales})[0]) > 3e-2
    again = fi.cutlass_fused_moe(**call)[0]
    assert torch.equal(again, out)
    fi.forget_weights()


@pytest.mark.parametrize("each", [False, True])
def test_under_torch_compile(each: bool) -> None:
    """Weights are looked up outside of the graph, and the layer is in the one that follows."""
    call, _ = nvfp4_call(each=each)
    (expected,) = fi.cutlass_fused_moe(**call)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **given: fi.cutlass_fused_moe(**given)[0], backend=backend)
    assert torch.equal(compiled(**call), expected)
    assert torch.equal(compiled(**call | {"output": torch.full_like(expected, float("nan"))}), expected)
    torch._dynamo.reset()
    assert operators.moe_layer in [node.target for graph in backend.graphs for node in graph.graph.nodes]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"input": torch.zeros(T, H // 2, dtype=torch.uint8)},
            ValueError,
            "input_sf: expected the scales of input that is NVFP4 already, got None",
        ),
        (
            {"input_sf": torch.zeros(T, 8, dtype=torch.uint8)},
            ValueError,
            "input_sf: expected None for input that is not",
        ),
        ({0: torch.ones(2)}, ValueError, r"quant_scales\[0\]: expected float32 \[3\], got float32 \[2\]"),
        (
            {1: torch.ones(E, 4, 4, dtype=torch.int32)},
            ValueError,
            r"quant_scales\[1\]: expected int32 \[3, 512, 2\], got",
        ),
        ({2: torch.zeros(E)}, ValueError, r"quant_scales\[2\]: expected finite numbers above .*, got 0 for"),
        ({3: torch.tensor(math.inf)}, ValueError, r"quant_scales\[3\]: expected finite .*, got inf$"),
        (
            {4: torch.full((E, H, 4), -1, dtype=torch.int32)},
            ValueError,
            r"quant_scales\[4\]: expected E4M3 bytes 0..126",
        ),
        ({5: torch.ones(E).double()}, TypeError, r"quant_scales\[5\]: expected float32 \[3\], got float64"),
        ({5: None}, TypeError, r"quant_scales\[5\]: expected .*, got NoneType"),
        (
            {"fc1_expert_weights": torch.zeros(E, 2 * I, 5, dtype=torch.int64)},
            ValueError,
            "fc1_expert_weights: .* of 128",
        ),
        (
            {"use_mxfp8_act_scaling": True},
            NotImplementedError,
            "quant_scales: quantization 'nvfp4_nvfp4' is here for CPU tensors alone",
        ),
    ],
)
def test_refused_layers(
    change: dict[Any, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes.wheel, "read_report", lambda: {"profile": "full"})
    call, _ = nvfp4_call()
    scales = [change.get(i, scale) for i, scale in enumerate(call["quant_scales"])]
    call |= {"quant_scales": scales} | {name: value for name, value in change.items() if isinstance(name, str)}
    with pytest.raises(error, match=words):
        fi.cutlass_fused_moe(**call)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("swizzled", [True, False])
def test_input_that_is_nvfp4_already(swizzled: bool, dtype: torch.dtype) -> None:
    """Codes under the global scale that the call would take for them: the same bits as of what they were made from."""
    call, _ = nvfp4_call(dtype=dtype)
    (expected,) = fi.cutlass_fused_moe(**call)
    layout = SfLayout.layout_128x4 if swizzled else SfLayout.layout_linear
    codes, scales = fi.nvfp4_quantize(call["input"], call["quant_scales"][0], layout)
    given = call | {"input": codes, "input_sf": scales, "swizzled_input_sf": swizzled}
    output = torch.full((T, H), torch.nan, dtype=dtype)
    (found,) = fi.cutlass_fused_moe(**given, output=output)
    assert found is output
    assert torch.equal(found, expected)
    for other in ({"input": codes.view(torch.int64)}, {"input_sf": scales.flatten().view(torch.float8_e4m3fn)}):
        assert torch.equal(fi.cutlass_fused_moe(**given | other)[0], expected)
    assert not torch.equal(fi.cutlass_fused_moe(**given | {"input": codes.roll(1, 1)})[0], expected)
    assert not torch.equal(fi.cutlass_fused_moe(**given | {"input_sf": scales.roll(1, 0)})[0], expected)
    asking = call["token_final_scales"].clone().requires_grad_()
    (found,) = fi.cutlass_fused_moe(**given | {"token_final_scales": asking})
    with pytest.raises(RuntimeError, match="^cutlass_fused_moe: no gradient can be computed through it"):
        found.float().sum().backward()
    dtypes = {"x_dtype": torch.uint8, "weight_dtype": torch.int64}
    assert fi.cutlass_fused_moe_workspace_size(T, H, I, E, K, **dtypes, device="cpu") == 0
    with pytest.raises(NotImplementedError, match="^x_dtype: quantization 'nvfp4_nvfp4'"):
        fi.cutlass_fused_moe_workspace_size(T, H, I, E, K, **dtypes)
    fi.forget_weights()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"input": torch.zeros(T, H, dtype=torch.uint8)},
            ValueError,
            r"input: expected uint8 \[8, 64\], got uint8 \[8, 1",
        ),
        (
            {"input_sf": torch.zeros(T, 8, dtype=torch.uint8)},
            ValueError,
            r"input_sf: expected 128x4-swizzled \[128, 8\] on",
        ),
        (
            {"swizzled_input_sf": False},
            ValueError,
            r"input_sf: expected linear \[8, 8\] on cpu, got uint8 \[128, 8\]",
        ),
        ({"input_sf": torch.zeros(128, 8)}, TypeError, "input_sf: expected uint8 or float8_e4m3fn"),
        (
            {"input_sf": torch.full((128, 8), 200, dtype=torch.uint8)},
            ValueError,
            "input_sf: expected E4M3 bytes without a sign, 0..127, got 200",
        ),
        ({"output": torch.zeros(T, H)}, TypeError, r"output: expected bfloat16 \[8, 128\], got float32"),
        ({"quant_scales": [torch.ones(1)] * 4}, ValueError, "quant_scales: expected 6 tensors .*, got 4"),
        (
            {"token_selected_experts": torch.zeros(T, 0, dtype=torch.int32), "token_final_scales": None},
            ValueError,
            r"token_selected_experts: expected \[8, k\] with k at least 1",
        ),
    ],
)
def test_refused_codes(change: dict[str, Any], error: type[Exception], words: str) -> None:
    call, _ = nvfp4_call()
    codes, scales = fi.nvfp4_quantize(call["input"], call["quant_scales"][0])
    with pytest.raises(error, match=f"^{words}"):
        fi.cutlass_fused_moe(**call | {"input": codes, "input_sf": scales} | change)
