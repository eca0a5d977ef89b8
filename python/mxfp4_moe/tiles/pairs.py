"""Pairs of formats, weights and activations: which there are kernels for, and which of them an arch's kernels read."""

from __future__ import annotations

from collections.abc import Iterable

from ..archs import check_arch

MXFP4_MXFP8 = "mxfp4_mxfp8"
MXFP4_BF16 = "mxfp4_bf16"
MXFP4_MXFP4 = "mxfp4_mxfp4"
NVFP4_NVFP4 = "nvfp4_nvfp4"
NVFP4_BF16 = "nvfp4_bf16"
MXFP4_FP16 = "mxfp4_fp16"
NVFP4_FP16 = "nvfp4_fp16"
PAIRS = (MXFP4_MXFP8, MXFP4_BF16, MXFP4_MXFP4, NVFP4_NVFP4, NVFP4_BF16, MXFP4_FP16, NVFP4_FP16)
"""Weights first. A profile of the manifest names those that it has; a row may name the ones that a tile can have."""
FP4_PAIRS = (MXFP4_MXFP4, NVFP4_NVFP4)
"""Those whose MMA takes packed codes of both operands, on SM12x; SM90 folds them into bf16."""
HALF_PAIRS = (MXFP4_BF16, NVFP4_BF16, MXFP4_FP16, NVFP4_FP16)
"""Those whose MMA takes 16-bit floats, to which weights are expanded."""

# Of each format, of weights or of activations: bits of a value, and the values that share a scale of one byte, 0: none.
_FORMATS = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32), "bf16": (16, 0), "fp16": (16, 0)}


def value_bytes(number_format: str) -> float:
    """Bytes of one value of a format, such as "mxfp4", with its part of a scale."""
    bits, block = _FORMATS[number_format]
    return bits / 8 + (1 / block if block else 0)


def formats_of(pair: str) -> tuple[str, str]:
    """The formats of weights and of activations."""
    weights, activations = pair.split("_")
    return weights, activations


def expert_bytes(pair: str, n: int, k: int) -> int:
    """Bytes of one expert's [n, k] weights: codes and scales, and two float32 factors where the pair has them, which
    are NVFP4's own, and those of MXFP4 weights in fp16.
    """
    weights, activations = formats_of(pair)
    factors = 8 if weights == "nvfp4" or activations == "fp16" else 0
    return int(n * k * value_bytes(weights)) + factors


def scale_words(pair: str) -> int:
    """32-bit words of scales that a weight row has in a K tile of 128: of blocks of 32, or NVFP4's of 16."""
    _, block = _FORMATS[formats_of(pair)[0]]
    return 32 // block


def pair_of(activation_format: str, weight_format: str = "mxfp4") -> str:
    """The pair of weights of a format and activations of another, such as "mxfp4" and "bf16"."""
    return f"{weight_format}_{activation_format}"


def kernel_pair(arch: str, pair: str) -> str:
    """What the kernel reads that computes `pair` on `arch`.

    SM90's MMA takes no scales: weights and activations have theirs multiplied in, in bf16, which holds both exactly, so
    one kernel serves all activations that go with a format of weights, but fp16.

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    if check_arch(arch)[0] == 9:
        if pair in HALF_PAIRS:
            return pair
        return NVFP4_BF16 if pair == NVFP4_NVFP4 else MXFP4_BF16
    return pair


def kernel_pairs(arch: str, pairs: Iterable[str]) -> tuple[str, ...]:
    """What the kernels read that compute these pairs on `arch`, each once: a kernel is built for each."""
    return tuple(dict.fromkeys(kernel_pair(arch, pair) for pair in pairs))
