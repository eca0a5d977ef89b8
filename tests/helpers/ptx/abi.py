"""csrc/tile_abi.h for ctypes. A test compares it with what a C++ compiler makes of the header."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_uint32, c_void_p

VERSION = 10  # MXFP4_MOE_TILE_ABI_VERSION


WEIGHT_FORMATS = ("mxfp4", "nvfp4")
"""Mxfp4MoeWeightFormat."""
ACT_FORMATS = ("mxfp8", "bf16", "mxfp4", "nvfp4", "fp16")
"""Mxfp4MoeActFormat."""


def formats_of(pair: str) -> tuple[int, int]:
    """A pair's weight_format and act_format."""
    weights, activations = pair.split("_")
    return WEIGHT_FORMATS.index(weights), ACT_FORMATS.index(activations)


class PerExpert(ctypes.Structure):
    """Mxfp4MoePerExpert: one number, or float32 [E]."""

    _fields_ = [("value", c_float), ("values", c_void_p)]


class Activate(ctypes.Structure):
    """Mxfp4MoeActivate: GEMM1's epilogue; none while `rows` is null."""

    _fields_ = [
        ("rows", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("format", c_int32),
        ("activation", c_int32),
        ("rounding", c_int32),
        ("alpha", PerExpert),
        ("beta", PerExpert),
        ("limit", PerExpert),
        ("global_scales", c_void_p),
    ]


class Factors(ctypes.Structure):
    """Mxfp4MoeFactors: of NVFP4 operands, and of MXFP4 weights by fp16 rows; else all null."""

    _fields_ = [("of_weights", c_void_p), ("of_rows", c_void_p), ("of_inputs", c_void_p)]


class GemmArgs(ctypes.Structure):
    """Mxfp4MoeGemmArgs; pointers are addresses in what the kernel takes for device memory."""

    _fields_ = [
        ("act", c_void_p),
        ("act_scale", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("m_tiles", c_void_p),
        ("num_m_tiles", c_void_p),
        ("max_m_tiles", c_int32),
        ("out_type", c_int32),
        ("rows", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("experts", c_int32),
        ("m_tiles_are_ready", c_int32),
        ("act_format", c_int32),
        ("weight_format", c_int32),
        ("factors", Factors),
        ("activate", Activate),
        ("stream", c_void_p),
    ]


class Tile(ctypes.Structure):
    """Mxfp4MoeTile: what a tile extension's `entry` points to."""

    _fields_ = [
        ("abi_version", c_uint32),
        ("tile_m", c_int32),
        ("tile_n", c_int32),
        ("swap_ab", c_int32),
        ("facts_of", ctypes.CFUNCTYPE(c_void_p, c_int32, c_int32, c_int32)),
        ("launch", ctypes.CFUNCTYPE(c_char_p, c_void_p)),
    ]


class Field(ctypes.Structure):
    """One line of fake_torch_cuda.cpp's `fake_tile_abi`."""

    _fields_ = [("name", c_char_p), ("offset", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


def layout() -> dict[str, tuple[int, int]]:
    """Offset and size of every struct and field, by the header's names."""
    found = {}
    for struct in (PerExpert, Activate, Factors, GemmArgs, Tile):
        name = f"Mxfp4Moe{struct.__name__}"
        found[name] = (0, ctypes.sizeof(struct))
        for field, _ in struct._fields_:
            place = getattr(struct, field)
            found[f"{name}.{field}"] = (place.offset, place.size)
    return found
