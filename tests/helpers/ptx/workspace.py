"""A layer's intermediates as tensors in the memory that its operator asked torch for: csrc/moe/workspace.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Recording, shared_recorder

_TYPES = {"rows1": torch.uint8, "scales1": torch.uint8, "rows2": torch.uint8, "scales2": torch.uint8}
_TYPES |= {"topk_weights": torch.float32, "gemm1_out": torch.float32}
_ORDER = ("slot_row", "row_expert", "m_tiles", "num_m_tiles", "valid_rows", "topk_ids", "topk_weights")
_ORDER += ("rows1", "scales1", "rows2", "scales2", "gemm1_out", "gemm2_out", "bytes")


def intermediates(
    recording: Recording,
    *,
    slots: int,
    hidden: int,
    inter: int,
    experts: int,
    tile_m: int,
    gemm1_width: int,
    from_logits: bool,
    dtype: torch.dtype = torch.bfloat16,
    in_bf16: bool = False,
) -> dict[str, Tensor]:
    """By the header's names.

    Args:
        recording: of fused_moe, whose one allocation is the workspace.
        slots: T * k.
        gemm1_width: 0 where GEMM1 applies the activation.
        dtype: of gemm2_out.
        in_bf16: whether the GEMMs read bfloat16, which has no scales.
    """
    [memory] = recording.allocations
    bound = (slots + min(slots, experts) * (tile_m - 1)) // tile_m
    numbers = shared_recorder().workspace(
        len(_ORDER), slots, hidden, inter, bound, gemm1_width, int(from_logits), int(in_bf16), dtype.itemsize
    )
    offsets = dict(zip(_ORDER, numbers, strict=True))
    assert offsets.pop("bytes") == len(memory)
    k_tiles = {"scales1": -(-hidden // 128), "scales2": -(-inter // 128)}
    shapes: dict[str, tuple[int, ...]] = {
        **{
            "slot_row": (slots,),
            "row_expert": (slots,),
            "m_tiles": (bound, 4),
            "num_m_tiles": (1,),
            "valid_rows": (1,),
        },
        **{"rows1": (slots, hidden), "rows2": (slots, inter), "gemm2_out": (slots, hidden)},
        **{name: (tiles, -(-slots // 4) * 4, 4) for name, tiles in k_tiles.items()},
    }
    types = _TYPES
    if in_bf16:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("scales")}
        types = types | {"rows1": torch.bfloat16, "rows2": torch.bfloat16}
    if from_logits:
        shapes |= {"topk_ids": (slots,), "topk_weights": (slots,)}
    if gemm1_width:
        shapes["gemm1_out"] = (slots, gemm1_width)
    found = {}
    for name, shape in shapes.items():
        kind = dtype if name == "gemm2_out" else types.get(name, torch.int32)
        count = torch.Size(shape).numel() * kind.itemsize
        part = torch.from_numpy(memory[offsets[name] :][:count])
        found[name] = part.view(kind).view(shape)
    return found
