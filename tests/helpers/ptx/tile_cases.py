"""What tiles are tested with, whichever pair of formats they read: sizes, seeds, and GEMM1's activations."""

from __future__ import annotations

import math
import zlib

import torch

from mxfp4_moe.activations import Activation

from .gemm import Epilogue

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A few n-tiles, the last of 16 columns where n-tiles are wider.
COLUMNS = {8: 16, 16: 32, 32: 80, 64: 144, 128: 144, 256: 272}


def seed_of(*words: object) -> int:
    return zlib.crc32(repr(words).encode())


EXPERTS_ROWS = (3, 0, 9)
KINDS = ("swiglu", "swiglu, bias, bfloat16", "swiglu_oai, bias, float16, per expert")
KINDS += ("swiglu_step, bias, per expert", "situ, bias, bfloat16", "situ, no limit")


def epilogue(kind: str, n: int) -> Epilogue:
    """Rounding, bias, and numbers for all or for each expert."""
    g = torch.Generator().manual_seed(n)
    bias = torch.randn(len(EXPERTS_ROWS), n, generator=g)
    if kind == "swiglu":
        return Epilogue(activation=Activation.SWIGLU)
    if kind == "swiglu, bias, bfloat16":
        return Epilogue(activation=Activation.SWIGLU, bias=bias, rounding=torch.bfloat16)
    if kind == "situ, bias, bfloat16":
        return Epilogue(activation=Activation.SITU, bias=bias, rounding=torch.bfloat16, beta=4.0, limit=25.0)
    if kind == "situ, no limit":
        return Epilogue(activation=Activation.SITU, beta=torch.tensor([4.0, 1.0, 0.5]), limit=math.inf)
    each = {
        "alpha": torch.tensor([1.702, 1.0, 0.5]),
        "beta": torch.tensor([1.0, 0.0, -2.0]),
        "limit": torch.tensor([7.0, 1.0, 3.0]),
    }
    if kind == "swiglu_step, bias, per expert":
        return Epilogue(activation=Activation.SWIGLU_STEP, bias=bias, **each)
    return Epilogue(activation=Activation.SWIGLU_OAI, bias=bias, rounding=torch.float16, **each)
