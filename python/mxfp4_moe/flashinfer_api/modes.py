"""Which of FlashInfer's modes is asked for: the one that is here, and each other refused by its argument's name.

The call and the question for its workspace's size ask the same things here, so both refuse the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType

import torch

from .._install import loading, wheel

HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *HALVES)
_SCALES = {
    4: "[fc1 scales, unused, fc2 scales, unused]",
    5: "[fc1 scales, fc1 global, fc2 act global, fc2 scales, fc2 global]",
}

# Names of `fused_moe` and `MoEWeights.from_flashinfer` -> those of `cutlass_fused_moe`.
_NAMES = {
    "hidden_states": "input",
    "hidden_states_scale": "input_sf",
    "topk_ids": "token_selected_experts",
    "topk_weights": "token_final_scales",
    "fc1_scale": "quant_scales[0]",
    "fc2_scale": "quant_scales[2]",
    "fused_moe": "cutlass_fused_moe",
}


class TheirNames:
    """Errors that leave this context name the arguments of `cutlass_fused_moe`, and not of what it calls."""

    def __init__(self, **more: str) -> None:
        self._more = more

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and error.args and isinstance(error.args[0], str):
            names = _NAMES | self._more
            words = re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], error.args[0])
            error.args = (words, *error.args[1:])


def refuse_modes(
    *,
    backend: str,
    use_deepseek_fp8_block_scale: bool,
    use_w4_group_scaling: bool,
    min_latency_mode: bool,
    use_packed_weights: bool,
    use_wfp4afp8_humming: bool,
    more: Mapping[str, tuple[bool, str]] | None = None,
) -> None:
    """Refuses every mode that is not here; `more`: argument -> whether it asks for one, and for what.

    Raises:
        NotImplementedError: a mode that is not here.
        ValueError: a backend that FlashInfer does not know.
    """
    modes = {
        "use_deepseek_fp8_block_scale": (use_deepseek_fp8_block_scale, "DeepSeek FP8 block scales"),
        "use_w4_group_scaling": (use_w4_group_scaling, "4-bit weights with group scales (INT4, W4A16)"),
        "min_latency_mode": (min_latency_mode, "minimum-latency mode"),
        "use_packed_weights": (use_packed_weights, "packed uint4 weights (INT4, W4A16)"),
        "use_wfp4afp8_humming": (use_wfp4afp8_humming, "folded weight scales with FP8 activations"),
        "backend": (backend == "cake", "'cake', the SiTU layer of NVFP4 weights"),
        **(more or {}),
    }
    for name, (asked, what) in modes.items():
        if asked:
            raise NotImplementedError(f"{name}: this library has no {what}; it has MXFP8 x MXFP4 only")
    if backend != "cutlass":
        raise ValueError(f"backend: expected 'cutlass', got {backend!r}")


def refuse_quantizations(
    input_dtype: torch.dtype, weight_dtype: torch.dtype, mxfp8: bool, names: tuple[str, str], num_scales: int = 0
) -> None:
    """Finds out which of FlashInfer's quantizations the dtypes mean, as it does, and refuses all but two.

    Args:
        mxfp8: use_mxfp8_act_scaling.
        names: arguments that the dtypes are of, for the message.
        num_scales: of quant_scales, where they are known.

    Raises:
        NotImplementedError: a quantization that is not here.
        TypeError: dtypes that are none of FlashInfer's either.
    """
    of_input, of_weights = names
    for name, dtype in ((of_input, input_dtype), (of_weights, weight_dtype)):
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name}: expected a torch.dtype, got {type(dtype).__name__}")
    if weight_dtype in _FLOATS:
        _refuse_quantization(of_weights, f"{str(input_dtype).removeprefix('torch.')}_unquantized")
    if weight_dtype is torch.float8_e4m3fn:
        _refuse_quantization(of_weights, "mxfp8_mxfp8" if mxfp8 else "fp8_fp8")
    if weight_dtype is torch.uint8:  # MXFP4 for FP8 input comes as int64 views
        _refuse_quantization(f"{of_weights} (uint8)", "bfloat16_int4")
    if weight_dtype is not torch.int64:
        raise TypeError(f"{of_weights}: expected torch.int64, a view of packed MXFP4, got {weight_dtype}")
    if input_dtype in (torch.uint8, torch.int64) or num_scales == 6:
        _refuse_quantization("quant_scales" if num_scales else of_input, "nvfp4_nvfp4")
    if input_dtype not in (torch.float8_e4m3fn, *HALVES):
        raise TypeError(f"{of_input}: expected torch.float8_e4m3fn, torch.bfloat16 or torch.float16, got {input_dtype}")


def is_nvfp4(input: torch.Tensor, weight_dtype: torch.dtype, mxfp8: bool, num_scales: int) -> bool:
    """Whether a call is NVFP4 x NVFP4 that is here: of CPU tensors, quantized on the way.

    Raises:
        NotImplementedError: CPU tensors of input that is NVFP4 already.
    """
    if weight_dtype is not torch.int64 or mxfp8 or num_scales != 6 or not input.is_cpu:
        return False
    if input.dtype in (torch.uint8, torch.int64):
        raise NotImplementedError(
            f"input: this library quantizes to NVFP4 itself and has no input that is NVFP4 already, got {input.dtype}; "
            "pass bfloat16 or float16 without input_sf"
        )
    return input.dtype in HALVES


def is_plain_fp8(input_dtype: torch.dtype, mxfp8: bool) -> bool:
    """Whether the activations are FP8 without scales, which FlashInfer calls FP8 x MXFP4."""
    return input_dtype is torch.float8_e4m3fn and not mxfp8


def check_num_scales(num_scales: int, plain_fp8: bool) -> None:
    """Raises a ValueError, unless there are as many quant_scales as the mode has."""
    expected = 5 if plain_fp8 else 4
    if num_scales != expected:
        other = "; with use_mxfp8_act_scaling=True and input_sf, 4" if plain_fp8 else ""
        raise ValueError(f"quant_scales: expected {expected} tensors {_SCALES[expected]}, got {num_scales}{other}")


def _refuse_quantization(argument: str, quantization: str) -> None:
    manifest = loading.manifest()
    profile = (wheel.read_report() or {}).get("profile") or manifest.default_profile
    refusal = manifest.refusal(profile, quantization)
    if refusal is None:  # the wheel has it, and this call has not
        refusal = f"quantization {quantization!r} is here for CPU tensors alone; fused_moe has it on GPUs too"
    raise NotImplementedError(f"{argument}: {refusal}")
