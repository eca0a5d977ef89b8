"""One layer of NVFP4 on its way in: tensors as ModelOpt and compressed-tensors store them, or floats quantized here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .._arguments import describe, has_values, require_contiguous, require_tensor
from .._install import wheel
from ..formats import BLOCK, NVFP4_BLOCK, WeightFormat, unswizzle_scales
from ..tiles import NVFP4_BF16, Manifest, load_manifest
from .layers import CODES, RawLayer, as_bytes, check_sizes, rows_name
from .options import GateUpOrder
from .sources import ceil_div, nvfp4_float_source, nvfp4_source
from .tensor_scales import DIVIDE, MULTIPLY, NAMES, TensorScales, from_float_scales, tensor_scales

Scales = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_LAYOUTS = ("linear", "swizzled")
_SCALES = (torch.float8_e4m3fn,)


def refuse_gpu(name: str, device: torch.device, sizes: tuple[int, ...] = ()) -> None:
    """NVFP4 weights go to a GPU that this wheel has kernels of them for.

    Args:
        sizes: hidden and intermediate size, where they are known.

    Raises:
        ValueError: such a wheel is another one, the GPU has none, or kernels cannot take the sizes.
    """
    if device.type != "cuda":
        return
    lacks = _manifest().refusal(wheel.profile(), NVFP4_BF16)
    if lacks is None and not _has_kernels(torch.cuda.get_device_capability(device)):
        lacks = "no kernel of this wheel runs there"
    if lacks is not None:
        raise ValueError(
            f"{name}: expected the CPU for NVFP4 weights, which this wheel has no kernels for on GPUs such as {device} "
            f"({lacks}); keep them on the CPU, or quantize the unquantized weights to MXFP4 (MoEWeights.from_float, "
            "from_pretrained)"
        )
    if wrong := [size for size in sizes if size % BLOCK]:
        raise ValueError(
            f"{name}: expected hidden and intermediate sizes that are multiples of {BLOCK} for NVFP4 weights on "
            f"{device}, whose kernels take no others, got {wrong[0]}; keep them on the CPU"
        )


@functools.cache
def _manifest() -> Manifest:
    return load_manifest()


@functools.cache
def _has_kernels(capability: tuple[int, int]) -> bool:
    return bool(wheel.tiles_of(NVFP4_BF16, capability))


def nvfp4_layer(
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    multiply: Scales,
    divide: Scales,
    biases: tuple[Tensor | None, Tensor | None],
    gated: bool,
    scale_layout: str,
) -> RawLayer:
    """Of tensors as checkpoints store them; see `MoEWeights.from_nvfp4`.

    Args:
        multiply, divide: its float32 scales, in the order of `tensor_scales.NAMES`.
    """
    if scale_layout not in _LAYOUTS:
        raise ValueError(f"scale_layout: expected 'linear' or 'swizzled', got {scale_layout!r}")
    w13, w2 = as_bytes(w13, CODES), as_bytes(w2, CODES)
    w13_scale, w2_scale = as_bytes(w13_scale, _SCALES), as_bytes(w2_scale, _SCALES)
    require_tensor("w13", w13, torch.uint8, ("E", rows_name(gated), "H/2"))
    experts, rows, hidden = w13.shape[0], w13.shape[1], 2 * w13.shape[2]
    inter = rows // 2 if gated else rows
    refuse_gpu("w13", w13.device, (hidden, inter))
    check_sizes("w13", w13, experts, hidden, inter, gated, NVFP4_BLOCK)
    require_tensor("w2", w2, torch.uint8, (experts, hidden, inter // 2), w13.device)
    return RawLayer(
        w13=nvfp4_source("w13_scale", w13.__getitem__, _linear("w13_scale", w13_scale, w13, scale_layout)),
        w2=nvfp4_source("w2_scale", w2.__getitem__, _linear("w2_scale", w2_scale, w2, scale_layout)),
        experts=experts,
        hidden=hidden,
        inter=inter,
        device=w13.device,
        w13_bias=biases[0],
        w2_bias=biases[1],
        format=WeightFormat.NVFP4,
        tensor_scales=_of_one_kind(multiply, divide, experts, gated, w13.device),
    )


def flashinfer_nvfp4_layer(
    fc1_expert_weights: Tensor,
    fc1_scale: Tensor,
    fc2_expert_weights: Tensor,
    fc2_scale: Tensor,
    fc1_expert_biases: Tensor | None,
    fc2_expert_biases: Tensor | None,
    gated: bool,
) -> RawLayer:
    """Of FlashInfer's packed views and swizzled scales, as `flashinfer_layer`, with float32 scales of 1.

    FlashInfer pads the scales of gates and of ups to 128 rows each, so I, and with it H, is a multiple of 128 here.
    """
    names = ("fc1_expert_weights", "fc1_scale", "fc2_expert_weights", "fc2_scale")
    require_tensor(names[0], fc1_expert_weights, torch.int64, ("E", rows_name(gated), "H/16"))
    refuse_gpu(names[0], fc1_expert_weights.device)
    (experts, rows, words), device = fc1_expert_weights.shape, fc1_expert_weights.device
    hidden, inter = words * 16, rows // 2 if gated else rows
    check_sizes(names[0], fc1_expert_weights, experts, hidden, inter, gated, 128)
    require_tensor(names[1], fc1_scale, torch.int32, (experts, rows, hidden // 64), device)
    require_tensor(names[2], fc2_expert_weights, torch.int64, (experts, hidden, inter // 16), device)
    require_tensor(names[3], fc2_scale, torch.int32, (experts, hidden, inter // 64), device)
    for name, tensor in zip(names, (fc1_expert_weights, fc1_scale, fc2_expert_weights, fc2_scale), strict=True):
        require_contiguous(name, tensor)
    one = torch.ones(experts, dtype=torch.float32, device=device)
    w13, w2 = fc1_expert_weights.view(torch.uint8), fc2_expert_weights.view(torch.uint8)
    scales = fc1_scale.view(torch.uint8), fc2_scale.view(torch.uint8)
    return RawLayer(
        w13=nvfp4_source(names[1], w13.__getitem__, _linear(names[1], scales[0], w13, "swizzled")),
        w2=nvfp4_source(names[3], w2.__getitem__, _linear(names[3], scales[1], w2, "swizzled")),
        experts=experts,
        hidden=hidden,
        inter=inter,
        device=device,
        w13_bias=fc1_expert_biases,
        w2_bias=fc2_expert_biases,
        bias_names=("fc1_expert_biases", "fc2_expert_biases"),
        format=WeightFormat.NVFP4,
        tensor_scales=TensorScales(w13=one.unsqueeze(1).repeat(1, 2 if gated else 1), w2=one),
    )


def _linear(name: str, scales: Tensor, packed: Tensor, layout: str) -> Callable[[int], Tensor]:
    """(expert) -> its scales uint8 [N, K/16], from one of the two layouts."""
    (experts, n), k = packed.shape[:2], 2 * packed.shape[2]
    if layout == "linear":
        require_tensor(name, scales, torch.uint8, (experts, n, k // NVFP4_BLOCK), packed.device)
        return scales.__getitem__
    require_tensor(name, scales, torch.uint8, None, packed.device)
    tiles = (ceil_div(n, 128), ceil_div(k, 4 * NVFP4_BLOCK), 512)
    size = tiles[0] * tiles[1] * tiles[2]
    if scales.dim() < 2 or scales.shape[0] != experts or scales.numel() != experts * size:
        raise ValueError(
            f"{name}: expected uint8 [{experts}, ...] with {size} bytes for each expert, 128x4-swizzled rows padded to "
            f"{128 * tiles[0]} and columns to {4 * tiles[1]}, got {describe(scales)}"
        )
    return lambda e: unswizzle_scales(scales[e].reshape(tiles), n, k, NVFP4_BLOCK)


def _of_one_kind(multiply: Scales, divide: Scales, experts: int, gated: bool, device: torch.device) -> TensorScales:
    """The float32 scales: those that multiply, or those that divide."""
    first, second = (
        [label for label, scale in zip(labels, scales, strict=True) if scale is not None]
        for labels, scales in ((MULTIPLY, multiply), (DIVIDE, divide))
    )
    kinds = (
        "the scales of one kind, those that multiply (ModelOpt's weight_scale_2 and input_scale) or those that divide "
        "(compressed-tensors' weight_global_scale and input_global_scale)"
    )
    if not first and not second:
        raise ValueError(f"w13_scale_2, w13_global_scale: expected {kinds}, got neither")
    if first and second:
        raise ValueError(f"{', '.join(second)}: expected {kinds}, got both, with {', '.join(first)}")
    values = dict(zip(NAMES, divide if second else multiply, strict=True))
    return tensor_scales(values, divide=bool(second), experts=experts, gated=gated, device=device)


def nvfp4_float_layer(raw: RawLayer, w13: Tensor, w2: Tensor, order: GateUpOrder, gated: bool) -> RawLayer:
    """A layer of floats, quantized to NVFP4 on the way: one scale for each expert's gates, ups and down projection.

    Args:
        raw: the layer, of `float_layer`.
        w13, w2: floats [E, N, K].

    Raises:
        ValueError: a value that is not finite; a GPU's tensors.
    """
    refuse_gpu("w13", raw.device, (raw.hidden, raw.inter))
    row = torch.arange(w13.shape[1], device=raw.device)
    part = torch.zeros_like(row)
    if gated:
        behind = (row >= raw.inter).long()
        part = {GateUpOrder.INTERLEAVED: row % 2, GateUpOrder.GATE_UP: behind, GateUpOrder.UP_GATE: 1 - behind}[order]
    amax13 = torch.zeros(raw.experts, 2 if gated else 1, dtype=torch.float32, device=raw.device)
    amax2 = torch.zeros(raw.experts, dtype=torch.float32, device=raw.device)
    for e in range(raw.experts):
        amax13[e].scatter_reduce_(0, part, w13[e].abs().amax(1).float(), "amax")
        amax2[e] = w2[e].abs().amax().float()
    for name, amax in (("w13", amax13), ("w2", amax2)):
        if has_values(amax) and not bool(amax.isfinite().all()):
            expert = int((~amax.isfinite()).nonzero()[0, 0])
            raise ValueError(f"{name}: expected finite values, got NaN or infinity in expert {expert}")
    scales = from_float_scales(amax13, amax2)
    encode13, encode2 = scales.w13.reciprocal(), scales.w2.reciprocal()
    return replace(
        raw,
        w13=nvfp4_float_source(w13.__getitem__, lambda e, rows: encode13[e, part[rows]]),
        w2=nvfp4_float_source(w2.__getitem__, lambda e, rows: encode2[e].expand(len(rows))),
        format=WeightFormat.NVFP4,
        tensor_scales=scales,
    )
