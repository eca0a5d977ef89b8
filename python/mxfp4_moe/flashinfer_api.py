"""FlashInfer's names for what this library does: change the import, and keep the calls.

Names, order and meaning of arguments and the shapes of results are FlashInfer's (0.7.2). One of its modes is here,
MXFP8 activations x MXFP4 weights (``use_mxfp8_act_scaling=True``, weights as int64 views); an argument that asks for
another raises NotImplementedError with its name. Beyond FlashInfer, bfloat16 and float16 input is taken too and
quantized on the way, hidden and intermediate sizes need only be multiples of 32, and all of it runs on CPU tensors.

FlashInfer passes raw weights with every call; here they are prepared by the first call and kept as long as the tensors
that they came from live, see `cutlass_fused_moe`. Code that can hold a `MoEWeights` saves the second copy: make it with
`MoEWeights.from_flashinfer`, free the raw tensors, and call `mxfp4_moe.fused_moe`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ._arguments import describe, require_tensor
from ._call.fused_moe import fused_moe
from ._install import loading, wheel
from .activations import Activation
from .formats import (
    BLOCK,
    E8M0_MAX,
    decode_e8m0,
    dequantize_mxfp4,
    dequantize_mxfp8,
    encode_e2m1,
    quantize_mxfp8,
    swizzle_scales,
    unswizzle_scales,
)
from .weights import MoEWeights

__all__ = [
    "ActivationType",
    "SfLayout",
    "block_scale_interleave",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "forget_weights",
    "mxfp4_dequantize",
    "mxfp4_quantize",
    "mxfp8_dequantize_host",
    "mxfp8_quantize",
]

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)
_RCP_6 = float.fromhex("0x1.555556p-3")  # 1/6 rounded to fp32


class ActivationType(IntEnum):
    """What stands between the GEMMs, by FlashInfer's numbers; `Activation` has the formulas."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3  # with swiglu_alpha, swiglu_beta or swiglu_limit: SwigluBias
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7  # swiglu_limit is 7.0 where it is not given
    GegluTanh = 8
    Identity = 9
    Situ = 10  # refused
    InvalidType = 11  # refused

    @property
    def is_gated(self) -> bool:
        """Whether fc1 holds an up and a gate row per output."""
        return self is ActivationType.Situ or (self in _ACTIVATIONS and _ACTIVATIONS[self].is_gated)


class SfLayout(IntEnum):
    """Layouts of scale factors, by FlashInfer's numbers."""

    layout_128x4 = 0
    layout_8x4 = 1  # refused
    layout_linear = 2


_ACTIVATIONS = {
    ActivationType.Gelu: Activation.GELU,
    ActivationType.Relu: Activation.RELU,
    ActivationType.Silu: Activation.SILU,
    ActivationType.Swiglu: Activation.SWIGLU,
    ActivationType.Geglu: Activation.GEGLU,
    ActivationType.SwigluBias: Activation.SWIGLU_OAI,
    ActivationType.Relu2: Activation.RELU2,
    ActivationType.SwigluStep: Activation.SWIGLU_STEP,
    ActivationType.GegluTanh: Activation.GEGLU_TANH,
    ActivationType.Identity: Activation.IDENTITY,
}


# ---- the layer -------------------------------------------------------------------------------------------------------


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor | None,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[Tensor],
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: ActivationType | int = ActivationType.Swiglu,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = False,
    profile_ids: Sequence[int] | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None,
) -> list[Tensor]:
    """One MoE layer. T tokens, k experts per token, E experts on this rank; W = 2I for gated activations, else I.

    The first call with a set of weights prepares them (seconds for a large layer, a second copy in memory); later
    calls find them by a few comparisons. The copy is freed with the tensors that it came from, and made anew when
    torch has counted a write to one of them. Writes that torch does not count are those through ``.data``, by other
    libraries' kernels, and to tensors made under inference mode: call `forget_weights` after such a write. While a
    CUDA graph is captured nothing can be prepared: call once before.

    Values are rounded where FlashInfer rounds them: GEMM1 and the activation to output_dtype, ahead of MXFP8. That is
    `fused_moe` with intermediate_rounding=True; its default keeps both in float32, so its bits are others.

    Args:
        input: float8_e4m3fn [T, H] with input_sf, or bfloat16 or float16 [T, H] without.
        token_selected_experts: int32 [T, k], ids of the whole layer's experts.
        token_final_scales: float32 [T, k], or None for ones.
        fc1_expert_weights: int64 [E, W, H/16], packed MXFP4; rows [up; gate] for gated activations.
        fc2_expert_weights: int64 [E, H, I/16].
        output_dtype: bfloat16 or float16.
        quant_scales: [fc1 int32 [E, W padded to 128, ceil(H/128)], ignored, fc2 int32 [E, H padded to 128,
            ceil(I/128)], ignored]; 128x4-swizzled E8M0 bytes. FlashInfer ignores the other two in this mode as well.
        fc1_expert_biases: [E, W], rows as fc1_expert_weights.
        fc2_expert_biases: [E, H], added on tp_rank 0 only, before the router scale.
        input_sf: uint8 E8M0 scales of float8 input: 128x4-swizzled, flat; or [T, H/32] with swizzled_input_sf=False.
        swiglu_alpha, swiglu_beta, swiglu_limit: float32 [E]; missing ones are 1, 0 and no limit.
        tp_size, tp_rank, ep_size, ep_rank: the weights passed in are this rank's own. Ids of other ranks' experts
            contribute nothing; summing the ranks' outputs is the caller's all-reduce.
        output: tensor [T, H] of output_dtype to write to.
        activation_type: see `ActivationType`.
        use_fused_finalize: True asks for a sum by atomics, in no fixed order, and is refused. The default differs from
            FlashInfer's, whose True stands for either.
        tune_max_num_tokens, enable_pdl, workspace_buffer: taken and not needed: tiles are not tuned by calls, and
            scratch comes from torch's caching allocator.
        others: modes that are not here; anything but their defaults is refused.

    Returns:
        [output], output [T, H].

    Raises:
        NotImplementedError: an argument that asks for a mode that is not here.
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        RuntimeError: weights not seen before while a CUDA graph is captured; see also `fused_moe`.
    """
    _refuse_modes(
        {
            "enable_alltoall": (enable_alltoall, "all-to-all communication"),
            "use_deepseek_fp8_block_scale": (use_deepseek_fp8_block_scale, "DeepSeek FP8 block scales"),
            "use_w4_group_scaling": (use_w4_group_scaling, "4-bit weights with group scales (INT4, W4A16)"),
            "min_latency_mode": (min_latency_mode, "minimum-latency mode"),
            "use_packed_weights": (use_packed_weights, "packed uint4 weights (INT4, W4A16)"),
            "use_wfp4afp8_humming": (use_wfp4afp8_humming, "folded weight scales with FP8 activations"),
            "use_fused_finalize": (use_fused_finalize, "sums by atomics, whose order changes from run to run"),
            "cluster_size": (cluster_size != 1 or cluster_rank != 0, "clusters of ranks"),
            "profile_ids": (any(i != -1 for i in profile_ids or ()), "FlashInfer kernel profiles"),
            "situ_beta": (situ_beta is not None or situ_linear_beta is not None, "SiTU activation"),
        }
    )
    kind = _activation_type(activation_type)
    _check_quantization(input, fc1_expert_weights, quant_scales, input_sf, use_mxfp8_act_scaling)
    require_tensor("token_selected_experts", token_selected_experts, torch.int32, ("T", "k"))
    if output_dtype not in _HALVES:
        raise ValueError(f"output_dtype: expected torch.bfloat16 or torch.float16, got {output_dtype}")
    if token_final_scales is None:
        token_final_scales = torch.ones(token_selected_experts.shape, device=token_selected_experts.device)

    numbers = (swiglu_alpha, swiglu_beta, swiglu_limit)
    weights: MoEWeights = _prepared(
        (
            fc1_expert_weights,
            quant_scales[0],
            fc2_expert_weights,
            quant_scales[2],
            fc1_expert_biases,
            fc2_expert_biases,
        ),
        numbers,
        _activation(kind, numbers),
        (ep_rank, ep_size, tp_rank, tp_size),
    )
    scale_layout = "swizzled" if swizzled_input_sf else "linear"
    if input_sf is not None:
        input_sf = _input_scales(input, input_sf, scale_layout)
    result = fused_moe(
        input,
        token_final_scales,
        token_selected_experts,
        weights,
        hidden_states_scale=input_sf,
        scale_layout=scale_layout,
        output_dtype=output_dtype,
        output=output,
        intermediate_rounding=True,
    )
    return [result]


def cutlass_fused_moe_workspace_size(
    max_num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts_total: int,
    top_k: int,
    *,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    output_dtype: torch.dtype = torch.bfloat16,
    activation_type: ActivationType | int = ActivationType.Swiglu,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    min_latency_mode: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_fused_finalize: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    device: torch.device | str | None = None,
) -> int:
    """Bytes that `cutlass_fused_moe` needs as workspace_buffer: 0, its scratch comes from torch's caching allocator.

    Raises:
        NotImplementedError: a mode that is not here.
        ValueError: a size below 1, or a rank outside its group.
    """
    _refuse_modes(
        {
            "min_latency_mode": (min_latency_mode, "minimum-latency mode"),
            "use_deepseek_fp8_block_scale": (use_deepseek_fp8_block_scale, "DeepSeek FP8 block scales"),
            "use_w4_group_scaling": (use_w4_group_scaling, "4-bit weights with group scales (INT4, W4A16)"),
            "use_packed_weights": (use_packed_weights, "packed uint4 weights (INT4, W4A16)"),
            "use_wfp4afp8_humming": (use_wfp4afp8_humming, "folded weight scales with FP8 activations"),
            "use_fused_finalize": (use_fused_finalize, "sums by atomics, whose order changes from run to run"),
        }
    )
    _activation_type(activation_type)
    sizes = {
        "max_num_tokens": max_num_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts_total": num_experts_total,
        "top_k": top_k,
        "tp_size": tp_size,
        "ep_size": ep_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    for name, rank, size in (("tp_rank", tp_rank, tp_size), ("ep_rank", ep_rank, ep_size)):
        if not 0 <= rank < size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {rank}")
    if num_experts_total % ep_size:
        raise ValueError(f"num_experts_total: expected a multiple of ep_size = {ep_size}, got {num_experts_total}")
    return 0


def _refuse_modes(modes: dict[str, tuple[bool, str]]) -> None:
    for name, (asked, what) in modes.items():
        if asked:
            raise NotImplementedError(f"{name}: this library has no {what}; it has MXFP8 x MXFP4 only")


def _refuse_quantization(argument: str, quantization: str) -> None:
    manifest = loading.manifest()
    profile = (wheel.read_report() or {}).get("profile") or manifest.default_profile
    refusal = manifest.refusal(profile, quantization)
    assert refusal is not None, "what the wheel has is not refused"
    raise NotImplementedError(f"{argument}: {refusal}")


def _activation_type(value: ActivationType | int) -> ActivationType:
    try:
        kind = ActivationType(value)
    except ValueError:
        raise ValueError(f"activation_type: expected an ActivationType, got {value!r}") from None
    if kind not in _ACTIVATIONS:
        having = ", ".join(k.name for k in _ACTIVATIONS)
        raise NotImplementedError(f"activation_type: {kind.name} is not in this library, which has {having}")
    return kind


def _activation(kind: ActivationType, numbers: tuple[Tensor | None, ...]) -> Activation:
    if kind is ActivationType.Swiglu and any(number is not None for number in numbers):
        return Activation.SWIGLU_OAI
    return _ACTIVATIONS[kind]


def _check_quantization(
    input: Tensor, weights: Tensor, quant_scales: Sequence[Tensor], input_sf: Tensor | None, mxfp8: bool
) -> None:
    """Finds out which of FlashInfer's modes the tensors mean, as it does from dtypes, and refuses all but one."""
    for name, value in (("input", input), ("fc1_expert_weights", weights)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if weights.dtype in _FLOATS:
        _refuse_quantization("fc1_expert_weights", f"{str(input.dtype).removeprefix('torch.')}_unquantized")
    if weights.dtype is torch.float8_e4m3fn:
        _refuse_quantization("fc1_expert_weights", "mxfp8_mxfp8" if mxfp8 else "fp8_fp8")
    if weights.dtype is torch.uint8:  # MXFP4 for MXFP8 input comes as int64 views
        _refuse_quantization("fc1_expert_weights (uint8)", "bfloat16_int4")
    scales = () if quant_scales is None else quant_scales
    if weights.dtype is torch.int64:
        if input.dtype in (torch.uint8, torch.int64) or len(scales) == 6:
            _refuse_quantization("quant_scales", "nvfp4_nvfp4")
        if input.dtype is torch.float8_e4m3fn and not mxfp8:
            _refuse_quantization("use_mxfp8_act_scaling", "fp8_mxfp4")
    if input.dtype is torch.float8_e4m3fn and input_sf is None:
        raise ValueError("input_sf: expected the scales of float8_e4m3fn input, got None")
    if input.dtype is not torch.float8_e4m3fn and input_sf is not None:
        raise ValueError(f"input_sf: expected None for input that is not float8_e4m3fn, got it with {describe(input)}")
    if len(scales) != 4:
        raise ValueError(
            f"quant_scales: expected 4 tensors [fc1 scales, unused, fc2 scales, unused], got {len(scales)}"
        )


def _input_scales(input: Tensor, input_sf: Tensor, scale_layout: str) -> Tensor:
    """The scales in the shape that `fused_moe` takes; FlashInfer looks at their bytes alone."""
    require_tensor("input_sf", input_sf, torch.uint8, None, input.device)
    shape = [input.shape[0], input.shape[-1] // BLOCK]
    if scale_layout == "linear" and input_sf.is_contiguous() and input_sf.numel() == shape[0] * shape[1]:
        return input_sf.view(shape)
    return input_sf.reshape(-1) if scale_layout == "swizzled" else input_sf


# ---- weights that stay prepared between calls ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Entry:
    versions: tuple[int, ...]
    weights: MoEWeights
    finalizers: tuple[weakref.finalize[Any, Any], ...]


_entries: dict[tuple[object, ...], _Entry] = {}
_preparing = threading.RLock()


def forget_weights() -> None:
    """Frees all prepared weights; the next call with any weights prepares them again."""
    for key in tuple(_entries):
        _forget(key)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph must not take what it found once for constant
def _prepared(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Tensor | None, ...],
    activation: Activation,
    ranks: tuple[int, int, int, int],
) -> MoEWeights:
    given = [tensor for tensor in (*tensors, *numbers) if tensor is not None]
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"weights, scales, biases and swiglu numbers: expected tensors, got {type(tensor).__name__}"
            )
    # The storage stands for the memory: views of it come and go with every call. Its wrapper lives as long as it does.
    places = tuple(
        None if t is None else (id(t.untyped_storage()), t.data_ptr(), t.shape, t.stride(), t.dtype)
        for t in (*tensors, *numbers)
    )
    key = (*places, activation, ranks)
    versions = tuple(-1 if t.is_inference() else t._version for t in given)
    entry = _entries.get(key)
    if entry is not None and entry.versions == versions:
        return entry.weights
    with _preparing:
        entry = _entries.get(key)
        if entry is None or entry.versions != versions:
            _forget(key)
            weights = _prepare(tensors, numbers, activation, ranks)
            storages = {id(storage): storage for storage in (t.untyped_storage() for t in given)}
            finalizers = tuple(weakref.finalize(storage, _forget, key) for storage in storages.values())
            for finalizer in finalizers:
                finalizer.atexit = False
            entry = _entries[key] = _Entry(versions, weights, finalizers)
    return entry.weights


def _prepare(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Tensor | None, ...],
    activation: Activation,
    ranks: tuple[int, int, int, int],
) -> MoEWeights:
    fc1, fc1_scale, fc2, fc2_scale, fc1_biases, fc2_biases = tensors
    assert fc1 is not None
    if fc1.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fc1_expert_weights: expected weights that an earlier call has prepared, got new ones while a CUDA graph "
            "is captured; call cutlass_fused_moe once before the capture"
        )
    for name, number in zip(("swiglu_alpha", "swiglu_beta", "swiglu_limit"), numbers, strict=True):
        if number is not None:
            require_tensor(name, number, torch.float32, (fc1.shape[0],), fc1.device)
    alpha, beta, limit = (None if number is None else number.contiguous() for number in numbers)
    no_limit = 7.0 if activation is Activation.SWIGLU_STEP else None
    weights = MoEWeights.from_flashinfer(
        fc1,
        fc1_scale,  # type: ignore[arg-type]  # None is refused by name
        fc2,  # type: ignore[arg-type]
        fc2_scale,  # type: ignore[arg-type]
        fc1_expert_biases=fc1_biases,
        fc2_expert_biases=fc2_biases,
        activation=activation,
        alpha=1.0 if alpha is None else alpha,
        beta=0.0 if beta is None else beta,
        limit=no_limit if limit is None else limit,
        ep_rank=ranks[0],
        ep_size=ranks[1],
        tp_rank=ranks[2],
        tp_size=ranks[3],
    )
    if fc1.is_cuda:  # calls on other streams find them without waiting
        torch.cuda.current_stream(fc1.device).synchronize()
    return weights


def _forget(key: tuple[object, ...]) -> None:
    entry = _entries.pop(key, None)
    if entry is not None:
        for finalizer in entry.finalizers:
            finalizer.detach()


# ---- quantizers ------------------------------------------------------------------------------------------------------


def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: SfLayout | int | None = None,
) -> tuple[Tensor, Tensor]:
    """MXFP8: E4M3 codes and one E8M0 scale per 32 values, as `formats.quantize_mxfp8`.

    Args:
        input: bfloat16 or float16 [..., K], K a multiple of 32.
        is_sf_swizzled_layout: scales 128x4-swizzled, else linear.
        alignment: K is padded to a multiple of it with zeros; a multiple of 32.
        enable_pdl, backend: taken and not needed.
        sf_swizzle_layout: goes before is_sf_swizzled_layout where it is given.

    Returns:
        codes float8_e4m3fn [..., padded K] (on the CPU too, where FlashInfer gives uint8), and scales uint8, flat:
        M x padded K / 32 of them, swizzled with M = rows padded to 128 and the blocks to 4.
    """
    require_tensor("input", input, _HALVES)
    if input.dim() == 0 or input.shape[-1] % BLOCK:
        raise ValueError(f"input: expected a last dimension that is a multiple of {BLOCK}, got {describe(input)}")
    if alignment < 1 or alignment % BLOCK:
        raise ValueError(f"alignment: expected a multiple of {BLOCK}, got {alignment}")
    layout = _layout("sf_swizzle_layout", _chosen(is_sf_swizzled_layout, sf_swizzle_layout))
    padded = torch.nn.functional.pad(input, (0, -input.shape[-1] % alignment))
    codes, scales = quantize_mxfp8(padded)
    return codes.view(torch.float8_e4m3fn), _store_scales(scales, layout).flatten()


def mxfp8_dequantize_host(
    input: Tensor,
    scale_tensor: Tensor,
    is_sf_swizzled_layout: bool = True,
    sf_swizzle_layout: SfLayout | int | None = None,
) -> Tensor:
    """Values of MXFP8 data.

    Args:
        input: float8_e4m3fn or uint8 [M, K], on any device.
        scale_tensor: uint8 scales as `mxfp8_quantize` gives them.
        is_sf_swizzled_layout, sf_swizzle_layout: their layout.

    Returns:
        float32 [M, K].
    """
    require_tensor("input", input, (torch.float8_e4m3fn, torch.uint8), ("M", "K"))
    layout = _layout("sf_swizzle_layout", _chosen(is_sf_swizzled_layout, sf_swizzle_layout))
    rows, k = input.shape
    return dequantize_mxfp8(input.view(torch.uint8), _load_scales("scale_tensor", scale_tensor, rows, k, layout))


def mxfp4_quantize(
    a: Tensor,
    backend: str = "cuda",
    enable_pdl: bool | None = None,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
) -> tuple[Tensor, Tensor]:
    """MXFP4 by FlashInfer's rule: the scale is amax / 6 rounded up to a power of two, so nothing saturates.

    `MoEWeights.from_float` and `formats.quantize_mxfp4` follow OCP MX instead, which rounds down.

    Args:
        a: bfloat16 or float16 [M, K], K a multiple of 32; finite.
        backend, enable_pdl: taken and not needed.
        sfLayout: layout of the scales.

    Returns:
        packed uint8 [M, K/2] (low nibble = even k), scales uint8 [M padded to 128, K/32 padded to 4] swizzled, or
        [M, K/32] linear; on the device of a (FlashInfer moves them to the GPU).
    """
    require_tensor("a", a, _HALVES, ("M", "K"))
    if a.shape[1] % BLOCK:
        raise ValueError(f"a: expected K a multiple of {BLOCK}, got {describe(a)}")
    if not bool(a.isfinite().all()):
        raise ValueError(f"a: expected finite values, got {describe(a)} with NaN or infinity")
    layout = _layout("sfLayout", sfLayout)
    blocks = torch.unflatten(a.to(torch.float32), -1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    bits = (amax * _RCP_6).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Exponent field 0 holds the subnormals: everything up to 2^-127 is byte 0.
    round_up = torch.where(exponent == 0, mantissa > 0x400000, mantissa != 0)
    scales = (exponent + round_up).clamp_(max=E8M0_MAX).to(torch.uint8)
    scaled = blocks * decode_e8m0(E8M0_MAX - scales).unsqueeze(-1)
    packed = encode_e2m1(scaled.masked_fill_((amax == 0).unsqueeze(-1), 0.0).flatten(-2))
    stored = _store_scales(scales, layout)
    return packed, stored.view(-1, -(-scales.shape[1] // 4) * 4) if layout is SfLayout.layout_128x4 else stored


def mxfp4_dequantize(a_fp4: Tensor, a_sf: Tensor, sfLayout: SfLayout | int = SfLayout.layout_128x4) -> Tensor:
    """Values of MXFP4 data, float32 [M, K] on the CPU (as FlashInfer's).

    Args:
        a_fp4: packed uint8 [M, K/2].
        a_sf: uint8 scales as `mxfp4_quantize` gives them, in any shape.
        sfLayout: their layout.
    """
    require_tensor("a_fp4", a_fp4, torch.uint8, ("M", "K/2"))
    packed, (rows, half_k) = a_fp4.cpu(), a_fp4.shape
    scales = _load_scales("a_sf", a_sf.cpu(), rows, half_k * 2, _layout("sfLayout", sfLayout))
    return dequantize_mxfp4(packed, scales)


def block_scale_interleave(unswizzled_sf: Tensor) -> Tensor:
    """Scales in the 128x4 order (`formats.swizzle_scales`), flat.

    Args:
        unswizzled_sf: uint8 [N, K/32] or [E, N, K/32].

    Returns:
        uint8 [E * (N padded to 128) * (K/32 padded to 4)].
    """
    require_tensor("unswizzled_sf", unswizzled_sf, torch.uint8)
    if unswizzled_sf.dim() not in (2, 3):
        raise ValueError(f"unswizzled_sf: expected uint8 [N, K/32] or [E, N, K/32], got {describe(unswizzled_sf)}")
    return swizzle_scales(unswizzled_sf).flatten()


def _chosen(swizzled: bool, layout: SfLayout | int | None) -> SfLayout | int:
    if layout is not None:
        return layout
    return SfLayout.layout_128x4 if swizzled else SfLayout.layout_linear


def _layout(name: str, value: SfLayout | int) -> SfLayout:
    try:
        layout = SfLayout(value)
    except ValueError:
        raise ValueError(f"{name}: expected an SfLayout, got {value!r}") from None
    if layout is SfLayout.layout_8x4:
        raise NotImplementedError(
            f"{name}: layout_8x4 is not in this library, which has layout_128x4 and layout_linear"
        )
    return layout


def _store_scales(scales: Tensor, layout: SfLayout) -> Tensor:
    """[..., K/32] -> swizzled tiles of all rows, or as they are."""
    return swizzle_scales(scales.flatten(0, -2)) if layout is SfLayout.layout_128x4 else scales


def _load_scales(name: str, stored: Tensor, rows: int, k: int, layout: SfLayout) -> Tensor:
    """The inverse of `_store_scales`, from any shape."""
    require_tensor(name, stored, torch.uint8)
    shape = [rows, k // BLOCK] if layout is SfLayout.layout_linear else [-(-rows // 128), -(-k // 128), 512]
    if stored.numel() != shape[0] * shape[1] * (1 if len(shape) == 2 else shape[2]):
        raise ValueError(f"{name}: expected {shape} bytes of scales for [{rows}, {k}], got {describe(stored)}")
    tiles = stored.reshape(shape)
    return tiles if layout is SfLayout.layout_linear else unswizzle_scales(tiles, rows, k)
