"""Values that the quantizers to FP4 must get right, and what rows of them are: of formats, and of the kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import oracles
import torch
from format_cases import random_float_bits, with_neighbours
from moe_cases import special_rows
from torch import Tensor

from mxfp4_moe import formats

KINDS = ("mxfp4", "nvfp4 of experts", "nvfp4 of rows")
GLOBAL_SCALES = torch.tensor([1.0, 0.37, 448 * 6 / 3.21, 3e-6, 5e7])  # of five experts


def hard_values(block: int) -> dict[str, np.ndarray]:
    """float32 [rows, K] of many kinds, by names; K is four blocks but for those with one value in all of a block."""
    rng = np.random.default_rng(block)
    shape = (24, 4 * block)
    normal = rng.normal(size=shape)
    # One block per value, the value its amax: where amax/6 passes a power of two, and E4M3's midpoints.
    edges = with_neighbours(np.concatenate((6 * np.exp2(np.arange(-24.0, 24)), 3 * np.arange(1, 64) * 2.0**-9)))
    edge_blocks = edges[:, None] * rng.uniform(-1, 1, (len(edges), block)).astype(np.float32)
    edge_blocks[np.arange(len(edges)), rng.integers(0, block, len(edges))] = edges
    # Values at midpoints of codes, under a scale of exactly 1.
    midpoints = with_neighbours(np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    ties = np.concatenate((midpoints[:, None].repeat(block // 2, 1), np.full((len(midpoints), block // 2), 6.0)), 1)
    zeros = np.zeros(shape)
    zeros[::3] = -0.0
    zeros[5, 5] = 1e-3
    bits = random_float_bits(24 * 4 * block, seed=4).reshape(shape)
    poisoned = normal.copy()
    poisoned[0, 3], poisoned[1, 40], poisoned[2, -1], poisoned[3, :block] = np.nan, np.inf, -np.inf, np.nan
    made = {
        "normal": normal,
        "edges": edge_blocks,
        "ties": ties,
        "every magnitude": normal * np.exp2(rng.integers(-30, 30, (24, 1))),
        "outliers": normal**9,
        "zeros of both signs": zeros,
        "random bits": np.where(np.isfinite(bits), bits, 1),
        "not finite": poisoned,
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


def hard_rows(width: int, block: int, most: int = 1000) -> np.ndarray:
    """`hard_values` as float32 [rows, width], each row of one kind; at most so many rows of each."""
    made = []
    for values in hard_values(block).values():
        flat = np.resize(values, -(-values.size // width) * width)
        made.append(flat.reshape(-1, width)[:most])
    return np.concatenate(made)


def hidden_of(width: int, dtype: torch.dtype, tokens: int) -> Tensor:
    """Special rows of each kind; those with zeros alone among them."""
    zeros = torch.zeros(2, width)
    zeros[1] = -0.0
    hard = torch.from_numpy(hard_rows(width, 16, 2)).to(dtype)
    x = torch.cat((special_rows(width, dtype), zeros.to(dtype), hard))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(width))
    return x[order].repeat(-(-tokens // len(x)), 1)[:tokens].contiguous()


# ---- what the kernels make of them -----------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What a kernel must write of some rows: packed codes, scales [rows, K / block], and NVFP4's factors."""

    packed: Tensor
    scales: Tensor
    factors: Tensor | None


def row_format(kind: str, *, folded: bool = False) -> int:
    """csrc/moe/kernels.h, RowFormat; `folded`: the values in bfloat16, as SM90's GEMMs read them."""
    return (3 if kind == "mxfp4" else 4) + (2 if folded else 0)


def in_bf16(rows: Rows) -> Tensor:
    """Codes times scales, worked out in float64: bfloat16 [R, K], NaN in poisoned blocks."""
    codes = torch.stack((rows.packed & 15, rows.packed >> 4), -1).flatten(1)
    block = codes.shape[1] // rows.scales.shape[1]
    values = torch.from_numpy(codes.numpy().view(oracles.E2M1).astype(np.float64))
    scales = rows.scales.numpy()
    if block == 32:
        each = torch.from_numpy(np.where(scales == 255, np.nan, np.exp2(scales.astype(np.float64) - 127)))
    else:
        each = torch.from_numpy(scales.view(oracles.E4M3).astype(np.float64))
    return (values * each.repeat_interleave(block, 1)).float().bfloat16()


def same_bf16(made: Tensor, expected: Tensor) -> bool:
    """Bit by bit, the signs of zeros too; a NaN is any."""
    bits = torch.equal(made.isnan(), expected.isnan())
    return bits and torch.equal(*(x.nan_to_num(0.0, math.inf, -math.inf).view(torch.int16) for x in (made, expected)))


def quantized(values: Tensor, kind: str, expert: Tensor, global_scales: Tensor | None = None) -> Rows:
    """values: [R, K] of any float; expert: of each row; global_scales: of experts, or GLOBAL_SCALES."""
    if kind == "mxfp4":
        return Rows(*formats.quantize_mxfp4_activations(values), None)
    own = kind == "nvfp4 of rows"
    given = GLOBAL_SCALES if global_scales is None else global_scales
    scale = formats.nvfp4_row_scales(values) if own else given[expert.long()]
    return Rows(*formats.quantize_nvfp4(values, scale), scale.reciprocal() if own else None)


def in_words(scales: Tensor, valid: int, like: Tensor | None = None) -> Tensor:
    """The first rows' scale bytes [valid, blocks and padding], of packed scales; of plain ones `like` those."""
    if like is None:
        return scales[:, :valid].transpose(0, 1).reshape(valid, -1)
    return torch.nn.functional.pad(scales[:valid], (0, like.shape[0] * 4 - scales.shape[1]))
