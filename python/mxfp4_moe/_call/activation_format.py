"""In which format the two GEMMs of a call read their activations, and which formats a device has kernels for."""

from __future__ import annotations

import functools

import torch

from .. import reference
from .._arguments import named_device
from .._install import loading, wheel
from ..tiles import Tile, pair_of


def activation_formats(device: torch.device | str | int) -> tuple[str, ...]:
    """What `fused_moe` takes as its activation_format for tensors on a device.

    Args:
        device: such as "cpu", "cuda" (the current one), or a CUDA device's number.

    Returns:
        Names, the default first: ("mxfp8", "bf16") on SM90 GPUs and for CPU tensors; on SM12x GPUs what the wheel was
        built for: ("mxfp8",), or both in a wheel of profile `full`, each of which reads weights that were put in its
        word order (`MoEWeights.to`); () where the wheel has no kernels.

    Raises:
        TypeError, ValueError: no device, such as a dtype.
        RuntimeError, AssertionError: torch's, for a device that is not here.
    """
    place = named_device("device", device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return _formats_of(place)


@functools.cache
def _formats_of(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return reference.ACTIVATION_FORMATS
    if device.type != "cuda":
        return ()
    return tuple(name for name in reference.ACTIVATION_FORMATS if tiles_of(name, device.index))


@functools.cache
def tiles_of(activation_format: str, device_index: int) -> tuple[Tile, ...]:
    """The manifest's tiles that have a kernel for activations of this format on a GPU."""
    return wheel.tiles_of(pair_of(activation_format), torch.cuda.get_device_capability(device_index))


def check_activation_format(activation_format: str, is_mxfp8: bool) -> None:
    """The part of the check that needs no device; also while a graph is traced.

    Args:
        activation_format: the argument.
        is_mxfp8: whether the hidden states are MXFP8 already.

    Raises:
        ValueError: not a format, or one that MXFP8 hidden states cannot be brought to.
    """
    if activation_format == "mxfp8":
        return
    if activation_format == "fp16":
        raise ValueError(
            "activation_format: expected 'mxfp8' or 'bf16', got 'fp16', for which there is no kernel yet; pass 'bf16', "
            "which takes float16 hidden_states too, or 'mxfp8'"
        )
    if activation_format != "bf16":
        raise ValueError(f"activation_format: expected 'mxfp8' or 'bf16', got {activation_format!r}")
    if is_mxfp8:
        raise ValueError(
            "activation_format: expected 'mxfp8' for hidden_states that are MXFP8 already, got 'bf16'; pass bfloat16 "
            "or float16 hidden_states without hidden_states_scale"
        )


def check_format_on(activation_format: str, device: torch.device) -> None:
    """Refuses a format that the device's kernels do not read.

    Raises:
        ValueError: 'bf16' on a GPU of SM12x, or in a build that emulates one, with a wheel without kernels for it.
    """
    if activation_format == "mxfp8":
        return
    formats = _formats_of(device)
    if formats and activation_format not in formats:  # where there are none, the launch says why
        lacks = loading.manifest().refusal(wheel.profile(), pair_of(activation_format))
        raise ValueError(
            f"activation_format: expected 'mxfp8', which is what the kernels for {device} read, got "
            f"{activation_format!r}: {lacks or 'no tile that was built has it'}; SM90 GPUs and CPU tensors take it "
            "with any wheel"
        )


def code_of(activation_format: str) -> int:
    """The number that stands for it in the C++ operators: csrc/moe/kernels.h, ActivationFormat."""
    return reference.ACTIVATION_FORMATS.index(activation_format)
