"""In which format the two GEMMs of a call read their activations, and which formats a device has kernels for."""

from __future__ import annotations

import functools

import torch

from .._arguments import named_device
from .._checkpoints.options import member
from .._install import loading, wheel
from ..formats import WeightFormat
from ..formats.weight_layout import ACTIVATION_NAMES, ACTIVATIONS_IN_WORDS
from ..tiles import Tile, pair_of
from ..weights import MoEWeights


def activation_formats(
    device: torch.device | str | int, weight_format: WeightFormat | str = WeightFormat.MXFP4
) -> tuple[str, ...]:
    """What `fused_moe` takes as its activation_format for tensors on a device.

    Args:
        device: such as "cpu", "cuda" (the current one), or a CUDA device's number.
        weight_format: of the weights, "mxfp4" or "nvfp4".

    Returns:
        Names, `fused_moe`'s default first where it is among them. CPU tensors have all: of MXFP4 weights ("mxfp8",
        "bf16", "mxfp4", "fp16"), of NVFP4 weights ("nvfp4", "bf16", "fp16"). GPUs have what the wheel was built for: of
        MXFP4 weights any wheel ("mxfp8",) on SM12x and ("mxfp8", "bf16", "mxfp4") on SM90; one of profile `full` all on
        both, on SM12x each of weights that were put in its word order (`MoEWeights.to`). () where the wheel has no
        kernels.

    Raises:
        TypeError, ValueError: no device, such as a dtype.
        RuntimeError, AssertionError: torch's, for a device that is not here.
    """
    place = named_device("device", device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    kind = member("weight_format", WeightFormat, weight_format)
    if place.type == "cpu":
        return kind.activations
    return _formats_of(place, kind)


@functools.cache
def _formats_of(device: torch.device, kind: WeightFormat) -> tuple[str, ...]:
    if device.type != "cuda":
        return ()
    return tuple(name for name in kind.activations if tiles_of(name, device.index, kind))


@functools.cache
def tiles_of(
    activation_format: str, device_index: int, weight_format: WeightFormat = WeightFormat.MXFP4
) -> tuple[Tile, ...]:
    """The manifest's tiles that have a kernel for activations and weights of these formats on a GPU."""
    pair = pair_of(activation_format, weight_format.value)
    return wheel.tiles_of(pair, torch.cuda.get_device_capability(device_index))


def format_of_call(activation_format: str | None, weights: MoEWeights) -> str:
    """The argument, by default what the weights' format has as its own; checked against that.

    Raises:
        TypeError, ValueError: no name of a format, or of one that goes with weights of another one.
    """
    formats = weights.weight_format.activations
    if activation_format is None:
        return formats[0]
    if type(activation_format) is str and activation_format in formats:
        return activation_format
    return weights.weight_format.activations_named(activation_format)


def check_activation_format(activation_format: str, is_mxfp8: bool, dtype: torch.dtype | None = None) -> None:
    """The part of the check that needs neither device nor weights; also while a graph is traced.

    Args:
        activation_format: the argument.
        is_mxfp8: whether the hidden states are MXFP8 already.
        dtype: theirs.

    Raises:
        TypeError: 'fp16' with bfloat16 hidden states, many of which float16 has not the range for.
        ValueError: not a format, or one that MXFP8 hidden states cannot be brought to.
    """
    if activation_format == "mxfp8":
        return
    if activation_format not in ACTIVATION_NAMES:
        raise ValueError(f"activation_format: expected {ACTIVATIONS_IN_WORDS}, got {activation_format!r}")
    if is_mxfp8:
        raise ValueError(
            f"activation_format: expected 'mxfp8' for hidden_states that are MXFP8 already, got {activation_format!r}; "
            "pass bfloat16 or float16 hidden_states without hidden_states_scale"
        )
    if activation_format == "fp16" and dtype is torch.bfloat16:
        raise TypeError(
            "hidden_states: expected float16 for activation_format 'fp16', got bfloat16, whose range float16 has not; "
            "pass activation_format='bf16', or hidden_states.half() where its values are known to be below 65520"
        )


def check_format_on(
    activation_format: str, device: torch.device, weight_format: WeightFormat = WeightFormat.MXFP4
) -> None:
    """Refuses a format that the device's kernels do not read.

    Raises:
        ValueError: on a GPU of SM12x, or in a build that emulates one, a format that the wheel has no kernels for.
    """
    if activation_format == "mxfp8" or device.type == "cpu":
        return
    formats = _formats_of(device, weight_format)
    if not formats or activation_format in formats:  # where there are none, the launch says why
        return
    words = f"activation_format: expected {' or '.join(map(repr, formats))}, which is what the kernels for {device} "
    words += f"read, got {activation_format!r}"
    pair = pair_of(activation_format, weight_format.value)
    lacks = loading.manifest().refusal(wheel.profile(), pair)
    if activation_format == "fp16":
        other = "activation_format 'bf16' takes float16 hidden_states too"
        other = other if "bf16" in formats else "CPU tensors take it"
        raise ValueError(f"{words}: {lacks or 'no tile that was built has it'}; {other}")
    raise ValueError(
        f"{words}: {lacks or 'no tile that was built has it'}; SM90 GPUs and CPU tensors take it with any wheel"
    )


def code_of(activation_format: str) -> int:
    """The number that stands for it in the C++ operators: csrc/moe/kernels.h, ActivationFormat."""
    return ACTIVATION_NAMES.index(activation_format)
