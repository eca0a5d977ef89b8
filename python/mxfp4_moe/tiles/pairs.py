"""Pairs of formats, weights and activations: which there are kernels for, and which of them an arch's kernels read."""

from __future__ import annotations

from collections.abc import Iterable

from ..archs import check_arch

MXFP4_MXFP8 = "mxfp4_mxfp8"
MXFP4_BF16 = "mxfp4_bf16"
PAIRS = (MXFP4_MXFP8, MXFP4_BF16)
"""Weights first. A profile of the manifest names those that it has; a row may name the ones that a tile can have."""


def pair_of(activation_format: str) -> str:
    """The pair of MXFP4 weights and activations of this format, such as "bf16"."""
    return f"mxfp4_{activation_format}"


def kernel_pair(arch: str, pair: str) -> str:
    """What the kernel reads that computes `pair` on `arch`.

    SM90's MMA takes no scales: weights and activations have theirs multiplied in, in bf16, which holds both exactly, so
    one kernel serves both kinds of activations.

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    return MXFP4_BF16 if check_arch(arch)[0] == 9 else pair


def kernel_pairs(arch: str, pairs: Iterable[str]) -> tuple[str, ...]:
    """What the kernels read that compute these pairs on `arch`, each once: a kernel is built for each."""
    return tuple(dict.fromkeys(kernel_pair(arch, pair) for pair in pairs))
