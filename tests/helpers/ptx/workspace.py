"""A layer's intermediates as tensors in the memory that its operator asked torch for: csrc/moe/workspace.h."""

from __future__ import annotations

import torch
from torch import Tensor

from . import abi
from .launch import Recording, shared_recorder

_TYPES = {"rows1": torch.uint8, "scales1": torch.uint8, "rows2": torch.uint8, "scales2": torch.uint8}
_TYPES |= dict.fromkeys(("topk_weights", "gemm1_out", "row_factors1", "row_factors2"), torch.float32)
_ORDER = ("slot_row", "row_expert", "m_tiles", "num_m_tiles", "valid_rows", "topk_ids", "topk_weights")
_ORDER += ("rows1", "scales1", "rows2", "scales2", "gemm1_out", "gemm2_out", "row_factors1", "row_factors2", "bytes")


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
    act_format: str = "mxfp8",
    row_factors: bool = False,
) -> dict[str, Tensor]:
    """By the header's names.

    Args:
        recording: of fused_moe, whose one allocation is the workspace.
        slots: T * k.
        gemm1_width: 0 where GEMM1 applies the activation.
        dtype: of gemm2_out.
        act_format: what the GEMMs read, of `abi.ACT_FORMATS`; 16-bit floats have no scales, FP4 rows are packed.
        row_factors: whether each NVFP4 row has a scale of its own.
    """
    [memory] = recording.allocations
    bound = (slots + min(slots, experts) * (tile_m - 1)) // tile_m
    sizes = (slots, hidden, inter, bound, gemm1_width, int(from_logits), abi.ACT_FORMATS.index(act_format))
    numbers = shared_recorder().workspace(len(_ORDER), *sizes, dtype.itemsize, int(row_factors))
    offsets = dict(zip(_ORDER, numbers, strict=True))
    assert offsets.pop("bytes") == len(memory)
    words = 2 if act_format == "nvfp4" else 1
    k_tiles = {"scales1": words * -(-hidden // 128), "scales2": words * -(-inter // 128)}
    per_byte = 2 if act_format in ("mxfp4", "nvfp4") else 1
    shapes: dict[str, tuple[int, ...]] = {
        **{
            "slot_row": (slots,),
            "row_expert": (slots,),
            "m_tiles": (bound, 4),
            "num_m_tiles": (1,),
            "valid_rows": (1,),
        },
        **{"rows1": (slots, hidden // per_byte), "rows2": (slots, inter // per_byte), "gemm2_out": (slots, hidden)},
        **{name: (tiles, -(-slots // 4) * 4, 4) for name, tiles in k_tiles.items()},
    }
    types = _TYPES
    if act_format in ("bf16", "fp16"):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("scales")}
        types = types | dict.fromkeys(("rows1", "rows2"), torch.bfloat16 if act_format == "bf16" else torch.float16)
    if from_logits:
        shapes |= {"topk_ids": (slots,), "topk_weights": (slots,)}
    if row_factors:
        shapes |= {"row_factors1": (slots,), "row_factors2": (slots,)}
    if gemm1_width:
        shapes["gemm1_out"] = (slots, gemm1_width)
    found = {}
    for name, shape in shapes.items():
        kind = dtype if name == "gemm2_out" else types.get(name, torch.int32)
        count = torch.Size(shape).numel() * kind.itemsize
        part = torch.from_numpy(memory[offsets[name] :][:count])
        found[name] = part.view(kind).view(shape)
    return found
