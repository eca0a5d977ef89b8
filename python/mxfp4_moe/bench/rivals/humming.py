"""humming-kernels, the JIT-compiled grouped GEMMs of vLLM: MXFP4 weights, activations in FP8 per token or in bfloat16.

Its own tile rules want sizes padded to 256 (unpadded it runs at half its speed), so weights are padded with zeros, and
the time is held against the unpadded layer's bytes. Routing comes from vLLM's operators, the last sum from Triton.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import vllm_ops
from .packages import Absent, Found, find_package, find_vllm_moe_library, make_importable

if TYPE_CHECKING:
    from torch import Tensor

    from ..inputs import CallInputs, LayerTensors

W4A8_NAME = "humming-w4a8"
W4A8_DESCRIPTION = "humming-kernels, FP8 activations with a scale per token, padded to 256, compiled at first use"
W4A16_NAME = "humming-w4a16"
W4A16_DESCRIPTION = "humming-kernels, bfloat16 activations, padded to 256, compiled at first use"

_PAD = 256
_PAD_SCALE = 118  # any value of the real scales' range: the weights under it are zero
_LARGEST_BLOCK = 64
# gpt-oss's SwiGLU of a gate `a` and an up value `b`, as humming takes it: a C++ expression.
_SWIGLU_OAI = "fminf(a, 7.f) / (1.f + expf(-1.702f * fminf(a, 7.f))) * (fmaxf(fminf(b, 7.f), -7.f) + 1.f)"

_library: dict[Path, Found] = {}


def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
    """The package; and vLLM's library of MoE operators, without which it has no router.

    Raises:
        Absent: one of the two is missing.
    """
    found = find_package("humming", "humming-kernels", folders)
    try:
        _library[found.path] = find_vllm_moe_library(folders)
    except Absent as absent:
        raise Absent(f"humming needs vLLM's routing operators, and {absent}") from None
    return found


def prepare_w4a8(found: Found, tensors: LayerTensors) -> Callable[[CallInputs], Callable[[], Tensor]]:
    """FP8 activations."""
    return _prepare(found, tensors, "float8e4m3")


def prepare_w4a16(found: Found, tensors: LayerTensors) -> Callable[[CallInputs], Callable[[], Tensor]]:
    """bfloat16 activations."""
    return _prepare(found, tensors, "bfloat16")


def block_rows(tuning: Sequence[Sequence[Any]], slots: int) -> int:
    """Rows of a block in humming's list of (above, up to, configuration) for this many slots; 64 beyond its end."""
    for above, up_to, configuration in tuning:
        if above < slots <= up_to:
            return int(configuration["block_shape"][0])
    return _LARGEST_BLOCK


def _prepare(found: Found, tensors: LayerTensors, dtype: str) -> Callable[[CallInputs], Callable[[], Tensor]]:
    make_importable(found)
    import torch
    from humming.forward import may_process_input
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config
    from torch.nn.functional import pad

    from .triton_sums import weighted_sum

    ops = vllm_ops.load(_library[found.path])
    shape = tensors.shape
    hidden, inter = (-(-size // _PAD) * _PAD for size in (shape.hidden, shape.intermediate))

    def layer(rows: int, k: int, blocks: Tensor, scales: Tensor, bias: Tensor) -> tuple[Any, Any]:
        module = HummingLayer(
            shape_n=rows,
            shape_k=k,
            weight_config={"quant_method": "gpt_oss_mxfp4"},
            input_config={"dtype": dtype},
            num_experts=shape.experts,
            has_bias=True,
            torch_dtype=torch.bfloat16,
        ).to(blocks.device)
        more = rows - blocks.shape[1]
        module.load_from_tensors(
            {
                "weight": pad(blocks, (0, k // 2 - blocks.shape[2], 0, more)),
                "weight_scale": pad(scales, (0, k // 32 - scales.shape[2], 0, more), value=_PAD_SCALE),
                "bias": pad(bias, (0, more)),
            }
        )
        module.transform()
        return module, get_heuristics_config(layer_config=module.humming_config, gemm_type="indexed")

    w13, tuning13 = layer(2 * inter, hidden, tensors.w13, tensors.w13_scale, tensors.w13_bias)
    w2, tuning2 = layer(hidden, inter, tensors.w2, tensors.w2_scale, tensors.w2_bias)
    compute, json13, json2 = json.dumps({"gemm_type": "indexed"}), json.dumps(tuning13), json.dumps(tuning2)

    def make_call(inputs: CallInputs) -> Callable[[], Tensor]:
        slots = inputs.tokens * shape.top_k
        router = vllm_ops.Router(ops, inputs, shape.top_k)
        x = pad(inputs.hidden_states, (0, hidden - shape.hidden))
        out = torch.empty_like(inputs.hidden_states)
        size13, size2 = block_rows(tuning13, slots), block_rows(tuning2, slots)
        blocks13, fill13 = router.blocks(size13, shape.experts)
        blocks2, fill2 = (blocks13, None) if size2 == size13 else router.blocks(size2, shape.experts)

        def gemm(module: Any, rows: Tensor, scale: Any, blocks: vllm_ops.Blocks, top_k: int, tuning: str) -> Tensor:
            result: Tensor = module(
                rows,
                input_scale=scale,
                sorted_ids=blocks.slots,
                expert_ids=blocks.experts,
                num_tokens_padded=blocks.padded,
                top_k=top_k,
                tuning_config=tuning,
                compute_config=compute,
                valid_shape_m=slots,
            )
            return result

        def call() -> Tensor:
            router.run()
            fill13()
            if fill2 is not None:
                fill2()
            pairs = gemm(w13, x, None, blocks13, shape.top_k, json13)
            between, group_scale, token_scale = may_process_input(
                w2.humming_config,
                pairs.view(slots, 2 * inter),
                activation_type="binary_interleaved",
                activation_impl=_SWIGLU_OAI,
            )
            scale = token_scale if group_scale is None else group_scale
            weighted_sum(gemm(w2, between, scale, blocks2, 1, json2).view(slots, hidden), router.weights, out)
            return out

        return call

    return make_call
