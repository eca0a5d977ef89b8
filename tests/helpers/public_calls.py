"""A call of every public function that computes with torch, with what it computes: its bits must be the same wherever.

Inputs are made once, in torch's own settings, and hold what settings could change: subnormal numbers, scales of 2^-127,
float32 products that bfloat16 does not hold.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import model_checkpoints
import nvfp4_cases
import oracles
import torch
from safetensors.torch import save_file
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import accuracy, arithmetic, flashinfer_api, formats, problems, reference
from mxfp4_moe.reference import routers
from mxfp4_moe.routers import Router, ScoringFunc
from mxfp4_moe.weights import MoEWeights

E, H, INTER, T, K = 3, 64, 64, 5, 2
CPU = torch.device("cpu")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=_generator(), dtype=torch.uint8)


def _floats(*shape: int, exponent: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator()) * 2.0**exponent


class Inputs:
    """What the calls are made with."""

    def __init__(self, folder: Path) -> None:
        checkpoint = oracles.random_checkpoint(E, H, INTER)
        self.checkpoint = checkpoint
        self.weights = MoEWeights.from_mxfp4(**checkpoint)
        self.x = _floats(T, H).bfloat16()
        self.x[1] *= 2.0**-130  # scales of byte 0 and 1, and values below them
        self.tiny = torch.cat([_floats(2, H, exponent=e) for e in (0, -118, -126, -140)])
        self.ids = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 9], [0, 2]], dtype=torch.int32)
        self.topk_weights = _floats(T, K).softmax(-1)
        self.topk_weights[2] *= 2.0**-126
        self.logits = _floats(T, E)
        self.codes, self.scales = formats.quantize_mxfp8(self.tiny)
        self.packed, self.packed_scales = formats.quantize_mxfp4(self.tiny)
        self.global_scale = torch.tensor(2.0**120)
        self.nvfp4_rows = formats.quantize_nvfp4(self.tiny, self.global_scale)
        self.nvfp4 = nvfp4_cases.random_nvfp4(experts=E, hidden=H, inter=INTER)
        self.tiny_nvfp4 = self.nvfp4 | {"w2_scale_2": self.nvfp4["w2_scale_2"] * 2.0**-124}  # factors below 2^-126
        self.offsets = torch.tensor([0, 2, 5, 8], dtype=torch.int32)
        self.gemm = (self.codes, self.scales, checkpoint["w13"], checkpoint["w13_scale"] // 4, self.offsets)
        self.rows = _floats(T * K, H, exponent=-130).bfloat16()
        self.row_expert = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
        self.gemm1 = _floats(10, 2 * INTER) * torch.tensor([[2.0 ** (-14 * i)] for i in range(10)])
        self.slot_row = torch.tensor([0, 3, 1, 4, 2, -1, 5, 6, 7, 8], dtype=torch.int32)
        w13, w2 = (checkpoint[name].view(torch.int64) for name in ("w13", "w2"))
        scales = [self._interleaved(checkpoint[f"{name}_scale"]) for name in ("w13", "w2")]
        self.flashinfer = (w13, w2, torch.bfloat16, [scales[0], torch.ones(E), scales[1], torch.ones(E)])
        self.floats = {"w13": _floats(E, 2 * INTER, H), "w2": _floats(E, H, INTER, exponent=-120)}
        self.path = folder / "model.safetensors"
        save_file(oracles.gpt_oss_tensors(checkpoint, 0), self.path)
        codes = (_bytes(2, 4, 32) & 0x77, _bytes(2, 3, 32) & 15)
        block_scales = (_bytes(2, 4, low=2, high=9), _bytes(2, 3, low=118, high=124))
        self.block = (*codes, *block_scales, _floats(2, 4, 3, exponent=-128))
        fp4_scales = (_bytes(2, rows, 2, high=20) for rows in (4, 3))
        self.fp4_block = (*(_bytes(2, rows, 64, high=16) for rows in (4, 3)), *fp4_scales, self.block[-1])
        self.float_block = [_floats(2, rows, 16, exponent=-65).bfloat16() for rows in (4, 3)]
        self.step = (_floats(4, 32).double().clamp(-3, 3), _bytes(4, 32).int() - 200, _floats(4, exponent=-126))
        self.more, self.sizes, self.tiny_halves = self.tiny * 8, self.tiny.abs().double(), self.tiny.bfloat16()
        self.near = self.tiny * 1.25
        self.low_logits = self.logits - 90
        self.bias = _floats(E)
        self.router = Router(
            top_k=K, scoring_func="sqrtsoftplus", e_score_correction_bias=self.bias, routed_scaling_factor=2.0**-126
        )
        self.router_folder = self._router_folder(folder / "router")
        self.shared = MoEWeights.from_mxfp4(**oracles.random_checkpoint(1, H, INTER))

    def _router_folder(self, folder: Path) -> Path:
        """A layer whose config.json says sigmoid, and whose files have a correction bias."""
        folder.mkdir()
        layer = model_checkpoints.layer_of("weight-scale", E, H, INTER)
        tensors = model_checkpoints.tensors_of("weight-scale", layer, 0)
        name = "model.layers.0.mlp.gate.e_score_correction_bias"
        model_checkpoints.write(folder, tensors | {name: self.bias.bfloat16()})
        config = {"model_type": "mimo_v2_flash", "hidden_act": "silu", "hidden_size": H, "moe_intermediate_size": INTER}
        config |= {"n_routed_experts": E, "num_experts_per_tok": K, "scoring_func": "sigmoid", "n_group": 1}
        config |= {"topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        model_checkpoints.write_config(folder, config)
        return folder

    @staticmethod
    def _interleaved(scales: Tensor) -> Tensor:
        return torch.stack([flashinfer_api.block_scale_interleave(e) for e in scales]).view(torch.int32).view(E, 128, 1)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


Case = Callable[[Inputs], Any]

CASES: dict[str, Case] = {
    # mxfp4_moe
    "mxfp4_moe.fused_moe": lambda i: mxfp4_moe.fused_moe(i.x, i.topk_weights, i.ids, i.weights),
    "mxfp4_moe.fused_moe_from_logits": lambda i: mxfp4_moe.fused_moe_from_logits(
        i.x, i.logits, K, i.weights, output=torch.zeros_like(i.x)
    ),
    "mxfp4_moe.topk_softmax": lambda i: mxfp4_moe.topk_softmax(i.logits, K, False),
    "mxfp4_moe.select_experts": lambda i: mxfp4_moe.select_experts(i.logits, i.router),
    "mxfp4_moe.load_router": lambda i: mxfp4_moe.load_router(i.router_folder, layer=0),
    "mxfp4_moe.join_shared_experts": lambda i: (
        mxfp4_moe.join_shared_experts(i.weights, i.shared, 0.5).choices(i.topk_weights, i.ids),
        mxfp4_moe.join_shared_experts(i.weights, i.shared, 0.5).weights,
    ),
    "mxfp4_moe.activation_formats": lambda i: mxfp4_moe.activation_formats("cpu"),
    "mxfp4_moe.select_tile_mn_for_sm120": lambda i: mxfp4_moe.select_tile_mn_for_sm120(100),
    "mxfp4_moe.get_cutlass_fused_moe_module": lambda i: mxfp4_moe.get_cutlass_fused_moe_module().fused_moe(
        i.x.half(), i.topk_weights, i.ids, i.weights, intermediate_rounding=True
    ),
    # MoEWeights
    "MoEWeights.from_mxfp4": lambda i: MoEWeights.from_mxfp4(**i.checkpoint),
    "MoEWeights.from_float": lambda i: MoEWeights.from_float(**i.floats),
    "MoEWeights.from_nvfp4": lambda i: MoEWeights.from_nvfp4(**i.nvfp4),
    "MoEWeights.to_nvfp4": lambda i: MoEWeights.from_nvfp4(**i.nvfp4).to_nvfp4(),
    "MoEWeights.from_flashinfer": lambda i: MoEWeights.from_flashinfer(
        i.flashinfer[0], i.flashinfer[3][0], i.flashinfer[1], i.flashinfer[3][2]
    ),
    "MoEWeights.from_safetensors": lambda i: MoEWeights.from_safetensors(i.path, layer=0),
    "MoEWeights.from_pretrained": lambda i: MoEWeights.from_pretrained(i.path, layer=0, activation="swiglu_oai"),
    "MoEWeights.to": lambda i: i.weights.to("cpu"),
    "MoEWeights.expert_parallel": lambda i: i.weights.expert_parallel(1, 2),
    "MoEWeights.tensor_parallel": lambda i: i.weights.tensor_parallel(1, 2),
    "MoEWeights.to_mxfp4": lambda i: i.weights.to_mxfp4(),
    "MoEWeights.fp16_factors": lambda i: (
        i.weights.fp16_factors(),
        MoEWeights.from_nvfp4(**i.tiny_nvfp4).fp16_factors(),
    ),
    "MoEWeights.update_fp16_factors": lambda i: (i.weights.update_fp16_factors(), i.weights.fp16_factors())[1],
    # formats
    "formats.scale_ends": lambda i: formats.scale_ends(i.packed, i.packed_scales),
    "formats.largest_scale": lambda i: formats.largest_scale(i.packed, i.packed_scales),
    "formats.fp16_factor": lambda i: formats.fp16_factor(torch.tensor([2, 120, 254], dtype=torch.int32, device=CPU)),
    "formats.largest_of_factor": lambda i: formats.largest_of_factor(
        torch.full((2,), 2.0**-126, dtype=torch.float32, device=CPU)
    ),
    "formats.mxfp4_in_fp16": lambda i: formats.mxfp4_in_fp16(
        _nibbles(i.packed), i.packed_scales, formats.largest_scale(i.packed, i.packed_scales)
    ),
    "formats.nvfp4_in_fp16": lambda i: formats.nvfp4_in_fp16(_nibbles(i.nvfp4_rows[0]), i.nvfp4_rows[1]),
    "formats.count_rounded_in_fp16": lambda i: formats.count_rounded_in_fp16(
        i.packed, i.packed_scales, formats.largest_scale(i.packed, i.packed_scales)
    ),
    "formats.decode_e2m1": lambda i: formats.decode_e2m1(i.packed),
    "formats.encode_e2m1": lambda i: formats.encode_e2m1(i.more),
    "formats.decode_e4m3": lambda i: formats.decode_e4m3(i.codes),
    "formats.encode_e4m3": lambda i: formats.encode_e4m3(i.tiny),
    "formats.decode_e8m0": lambda i: formats.decode_e8m0(i.scales),
    "formats.encode_e8m0": lambda i: formats.encode_e8m0(i.tiny.abs()),
    "formats.quantize_mxfp8": lambda i: formats.quantize_mxfp8(i.tiny),
    "formats.dequantize_mxfp8": lambda i: formats.dequantize_mxfp8(i.codes, i.scales),
    "formats.mxfp8_to_bf16": lambda i: formats.mxfp8_to_bf16(i.codes, i.scales),
    "formats.quantize_mxfp4": lambda i: formats.quantize_mxfp4(i.tiny),
    "formats.quantize_mxfp4_activations": lambda i: formats.quantize_mxfp4_activations(i.tiny),
    "formats.nvfp4_global_scale": lambda i: formats.nvfp4_global_scale(i.tiny),
    "formats.nvfp4_row_scales": lambda i: formats.nvfp4_row_scales(i.tiny),
    "formats.quantize_nvfp4": lambda i: formats.quantize_nvfp4(i.tiny, i.global_scale),
    "formats.dequantize_nvfp4": lambda i: formats.dequantize_nvfp4(*i.nvfp4_rows, i.global_scale),
    "formats.nvfp4_products": lambda i: formats.nvfp4_products(*i.nvfp4_rows),
    "formats.dequantize_mxfp4": lambda i: formats.dequantize_mxfp4(i.packed, i.packed_scales),
    "formats.swizzle_scales": lambda i: formats.swizzle_scales(i.scales),
    "formats.unswizzle_scales": lambda i: formats.unswizzle_scales(formats.swizzle_scales(i.scales), 8, H),
    "formats.interleave_k": lambda i: formats.interleave_k(i.codes),
    "formats.deinterleave_k": lambda i: formats.deinterleave_k(i.codes),
    "formats.pack_row_scales": lambda i: formats.pack_row_scales(i.scales),
    "formats.unpack_row_scales": lambda i: formats.unpack_row_scales(formats.pack_row_scales(i.scales), 8, H),
    "formats.pack_words": lambda i: formats.pack_words(i.packed, formats.WordOrder.PAIRS),
    "formats.unpack_words": lambda i: formats.unpack_words(i.packed, formats.WordOrder.PAIRS),
    "formats.weight_bytes": lambda i: formats.weight_bytes(64, H),
    "formats.word_order_of": lambda i: formats.word_order_of(CPU),
    "formats.arrange_weights": lambda i: formats.arrange_weights(i.packed, i.packed_scales, formats.WordOrder.PAIRS),
    "formats.restore_weights": lambda i: formats.restore_weights(
        i.weights.w2[0], H, INTER, formats.WordOrder.CONTAINERS
    ),
    "formats.read_rows": lambda i: formats.read_rows(
        i.weights.w2[0], H, INTER, slice(0, 40), formats.WordOrder.CONTAINERS
    ),
    "formats.write_rows": lambda i: _written(i),
    "formats.reorder_words": lambda i: formats.reorder_words(
        i.weights.w2[0], H, INTER, formats.WordOrder.CONTAINERS, formats.WordOrder.PAIRS
    ),
    # reference
    "reference.activate": lambda i: reference.activate(i.gemm1, i.row_expert, None, "geglu_tanh"),
    "reference.as_rows": lambda i: (reference.as_rows(i.tiny, "bf16")[0], *reference.as_rows(i.tiny, "mxfp8")),
    "reference.default_output_dtype": lambda i: reference.default_output_dtype(i.x, None),
    "reference.finalize": lambda i: reference.finalize(i.rows, i.topk_weights, i.slot_row, i.row_expert, None),
    "reference.fused_moe": lambda i: reference.fused_moe(
        i.x, i.topk_weights, i.ids, i.weights, arithmetic=arithmetic.SM12X_MXF8F6F4
    ),
    "reference.grouped_gemm": lambda i: reference.grouped_gemm(*i.gemm),
    "reference.layer": lambda i: reference.layer(
        i.x, i.topk_weights, i.ids, i.weights, lambda gemm1, _: formats.quantize_mxfp8(gemm1[:, :INTER])
    ),
    "reference.m_tiles": lambda i: reference.m_tiles(i.offsets, 2),
    "reference.mxfp8_rows": lambda i: reference.mxfp8_rows(i.codes, i.scales, "linear"),
    "reference.route": lambda i: reference.route(i.ids, E),
    "reference.topk_softmax": lambda i: reference.topk_softmax(i.low_logits, K, False),
    "routers.select_experts": lambda i: routers.select_experts(i.logits, i.router),
    "routers.scores": lambda i: [routers.scores(i.low_logits, kind) for kind in ScoringFunc],
    "routers.exp_of_negative": lambda i: routers.exp_of_negative(i.low_logits),
    "routers.log1p_of_fraction": lambda i: routers.log1p_of_fraction(i.tiny.abs()),
    # arithmetic, accuracy
    "arithmetic.mma_step": lambda i: arithmetic.mma_step(arithmetic.SM12X_MXF8F6F4, *i.step),
    "arithmetic.block_scaled_mma": lambda i: arithmetic.block_scaled_mma(*i.block, a_format="e4m3", b_format="e2m1"),
    "arithmetic.fp4_mma": lambda i: arithmetic.fp4_mma(*i.fp4_block),
    "arithmetic.float_mma": lambda i: arithmetic.float_mma(*i.float_block, i.block[-1]),
    "arithmetic.gemm": lambda i: _gemm(i),
    "arithmetic.of_arch": lambda i: arithmetic.of_arch("120f").name,
    "arithmetic.family": lambda i: len(arithmetic.family(arithmetic.SM90_BF16)),
    "accuracy.sums_and_bound": lambda i: accuracy.sums_and_bound(*i.gemm, arithmetic=arithmetic.SM90_BF16),
    "accuracy.coarsest": lambda i: len(accuracy.coarsest(arithmetic.SM90_BF16)),
    "accuracy.exponent": lambda i: accuracy.exponent(i.sizes),
    # flashinfer_api
    "flashinfer_api.cutlass_fused_moe": lambda i: flashinfer_api.cutlass_fused_moe(
        i.x, i.ids, None, *i.flashinfer, use_mxfp8_act_scaling=True
    ),
    "flashinfer_api.cutlass_fused_moe_workspace_size": lambda i: flashinfer_api.cutlass_fused_moe_workspace_size(
        8, H, INTER, E, K, x_dtype=torch.bfloat16, weight_dtype=torch.int64
    ),
    "flashinfer_api.set_raw_weights": lambda i: flashinfer_api.set_raw_weights("auto"),
    "flashinfer_api.forget_weights": lambda i: flashinfer_api.forget_weights(),
    "flashinfer_api.mxfp8_quantize": lambda i: flashinfer_api.mxfp8_quantize(i.x),
    "flashinfer_api.mxfp8_dequantize_host": lambda i: flashinfer_api.mxfp8_dequantize_host(
        i.codes, i.scales.flatten(), False
    ),
    "flashinfer_api.mxfp4_quantize": lambda i: flashinfer_api.mxfp4_quantize(i.tiny_halves),
    "flashinfer_api.mxfp4_dequantize": lambda i: flashinfer_api.mxfp4_dequantize(i.packed, i.packed_scales, sfLayout=2),
    "flashinfer_api.nvfp4_quantize": lambda i: flashinfer_api.nvfp4_quantize(i.tiny_halves, i.global_scale),
    "flashinfer_api.fp4_quantize": lambda i: flashinfer_api.fp4_quantize(
        i.tiny_halves, torch.ones(1, dtype=torch.float32, device="cpu"), 32, True
    ),
    "flashinfer_api.mxfp4_dequantize_host": lambda i: flashinfer_api.mxfp4_dequantize_host(i.packed, i.packed_scales),
    "flashinfer_api.get_cutlass_fused_moe_module": lambda i: flashinfer_api.get_cutlass_fused_moe_module().tile,
    "flashinfer_api.select_tile_mn_for_sm120": lambda i: flashinfer_api.select_tile_mn_for_sm120(1),
    "flashinfer_api.block_scale_interleave": lambda i: flashinfer_api.block_scale_interleave(i.scales),
    "flashinfer_api.interleave_moe_weights_for_sm90_mixed_gemm": (
        lambda i: flashinfer_api.interleave_moe_weights_for_sm90_mixed_gemm(i.checkpoint["w13"])
    ),
    "flashinfer_api.interleave_moe_scales_for_sm90_mixed_gemm": (
        lambda i: flashinfer_api.interleave_moe_scales_for_sm90_mixed_gemm(i.checkpoint["w13_scale"].repeat(1, 1, 2))
    ),
    # problems
    "problems.bits": lambda i: problems.bits(i.tiny),
    "problems.relative_error": lambda i: problems.relative_error(i.near, i.tiny),
    "problems.arithmetic_here": lambda i: problems.arithmetic_here(CPU).name,
    "problems.offsets_of": lambda i: problems.offsets_of([1, 0, 3], CPU),
    "problems.random_problem": lambda i: problems.random_problem(64, 32, CPU, rows_per_expert=(1, 9)),
    "problems.sparse_problem": lambda i: problems.sparse_problem(64, 32, CPU),
    "problems.integer_problem": lambda i: problems.integer_problem(64, 32, CPU),
    "problems.layout_problem": lambda i: problems.layout_problem(CPU),
    "problems.random_weights": lambda i: problems.random_weights(2, 64, 32, CPU),
    "problems.random_call": lambda i: vars(problems.random_call(3, 2, i.weights)),
}
# Public, and nothing that a setting of torch could change; or of a GPU alone.
OTHERS = {"mxfp4_moe.prewarm_moe_tiles", "flashinfer_api.prewarm_moe_tiles", "problems.places"}


def _written(i: Inputs) -> Tensor:
    weight = torch.zeros_like(i.weights.w2[0])
    rows = formats.read_rows(i.weights.w2[0], H, INTER, slice(0, H), CONTAINERS)
    formats.write_rows(weight, H, INTER, 0, *rows, PAIRS)
    return weight


CONTAINERS, PAIRS = formats.WordOrder.CONTAINERS, formats.WordOrder.PAIRS


def _gemm(i: Inputs) -> Tensor:
    out = torch.full((8, 2 * INTER), float("nan"), dtype=torch.float32, device="cpu")
    arithmetic.gemm(arithmetic.SM12X_MXF8F6F4, i.codes, i.scales, i.gemm[2][0], i.gemm[3][0], out)
    return out


def public_functions() -> set[str]:
    """The names of all public functions of the modules that compute, and of MoEWeights's methods."""
    modules: dict[str, ModuleType] = {
        "mxfp4_moe": mxfp4_moe,
        "formats": formats,
        "reference": reference,
        "routers": routers,
        "arithmetic": arithmetic,
        "accuracy": accuracy,
        "flashinfer_api": flashinfer_api,
        "problems": problems,
    }
    found = set()
    for name, module in modules.items():
        public = getattr(module, "__all__", ())
        own = [getattr(module, each) for each in {*public, *_defined_in(module)}]
        found |= {f"{name}.{each.__name__}" for each in own if inspect.isfunction(inspect.unwrap(each))}
    methods = inspect.getmembers(MoEWeights, lambda each: inspect.isfunction(each) or inspect.ismethod(each))
    return found | {f"MoEWeights.{name}" for name, _ in methods if not name.startswith("_")}


def _defined_in(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def flat(value: Any) -> list[Any]:
    """A result as a list of plain values, tensors by dtype, shape and bits."""
    if isinstance(value, Tensor):
        bits = value.detach().contiguous().view(torch.uint8) if value.dim() else value.detach()[None].view(torch.uint8)
        return [value.dtype, tuple(value.shape), value.device, bits.flatten().tolist()]
    if isinstance(value, dict):
        return [value.keys(), *(part for each in value.values() for part in flat(each))]
    if isinstance(value, (tuple, list)):
        return [part for each in value for part in flat(each)]
    if is_dataclass(value) and not isinstance(value, type):
        return [part for field in fields(value) for part in flat(getattr(value, field.name))]
    return [value]


@functools.cache
def expected(name: str, inputs: Inputs) -> list[Any]:
    """What a case gives in torch's own settings."""
    return flat(CASES[name](inputs))
