"""Which of FlashInfer's modes is asked for: one of those that are here, and each other refused by its argument's name.

The call and the question for its workspace's size ask the same things here, so both refuse the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from types import TracebackType

import torch
from torch import Tensor

from .._call.activation_format import tiles_of
from .._install import loading, wheel

HALVES = (torch.bfloat16, torch.float16)
CODES = (torch.uint8, torch.int64)  # of input that is NVFP4 already
_FLOATS = (torch.float32, *HALVES)


class Mode(Enum):
    """FlashInfer's modes that are here: what each is called, and its quant_scales in their order."""

    MXFP8 = ("MXFP8 x MXFP4", ("fc1 scales", "unused", "fc2 scales", "unused"))
    FP8 = ("FP8 x MXFP4", ("fc1 scales", "fc1 global", "fc2 act global", "fc2 scales", "fc2 global"))
    BF16 = ("bf16 x MXFP4", ("fc1 scales", "fc2 scales"))
    NVFP4 = (
        "NVFP4 x NVFP4",
        ("fc1 act global", "fc1 scales", "fc1 global", "fc2 act global", "fc2 scales", "fc2 global"),
    )

    def __init__(self, words: str, scales: tuple[str, ...]) -> None:
        self.words = words
        self.scales = scales
        self._places = {scale: i for i, scale in enumerate(scales)}
        self.fc1, self.fc2 = self._places["fc1 scales"], self._places["fc2 scales"]

    @property
    def activation_format(self) -> str | None:
        """What `fused_moe` is asked for; None for the default of the weights' format."""
        return "bf16" if self is Mode.BF16 else None

    def argument(self, scale: str) -> str:
        """The place of a scale among a call's arguments, for messages."""
        return f"quant_scales[{self._places[scale]}]" if scale in self._places else "quant_scales"

    def scale(self, quant_scales: Sequence[Tensor], scale: str) -> Tensor | None:
        """One of a call's quant_scales by its name; None where the mode does not have it."""
        place = self._places.get(scale)
        return None if place is None else quant_scales[place]

    def check_num_scales(self, num_scales: int) -> None:
        """Raises a ValueError, unless there are as many quant_scales as the mode has."""
        expected = len(self.scales)
        if num_scales != expected:
            other = {
                Mode.FP8: "; with use_mxfp8_act_scaling=True and input_sf, 4",
                Mode.BF16: "; use_w4_group_scaling=True is bf16 x MXFP4",
            }
            raise ValueError(
                f"quant_scales: expected {expected} tensors [{', '.join(self.scales)}], got {num_scales}"
                f"{other.get(self, '')}"
            )


MODES_IN_WORDS = f"{', '.join(mode.words for mode in Mode if mode is not Mode.NVFP4)}, and NVFP4 x NVFP4 of CPU tensors"

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
        "min_latency_mode": (min_latency_mode, "minimum-latency mode"),
        "use_packed_weights": (use_packed_weights, "packed INT4 weights (W4A8, W4A16)"),
        "use_wfp4afp8_humming": (use_wfp4afp8_humming, "folded weight scales with FP8 activations"),
        "backend": (backend == "cake", "'cake', the SiTU layer of NVFP4 weights"),
        **(more or {}),
    }
    for name, (asked, what) in modes.items():
        if asked:
            raise NotImplementedError(f"{name}: this library has no {what}; it has {MODES_IN_WORDS}")
    if backend != "cutlass":
        raise ValueError(f"backend: expected 'cutlass', got {backend!r}")


def mode_of(
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    use_w4_group_scaling: bool,
    use_mxfp8_act_scaling: bool,
    names: tuple[str, str],
    on_cpu: bool = False,
    num_scales: int = 0,
) -> Mode:
    """Finds out which of FlashInfer's quantizations the dtypes mean, as it does, and refuses those that are not here.

    Args:
        names: arguments that the dtypes are of, for the message.
        on_cpu: whether the input is known to be a CPU tensor.
        num_scales: of quant_scales, where they are known.

    Raises:
        NotImplementedError: a quantization that is not here.
        TypeError: dtypes that are none of FlashInfer's either.
        ValueError: flags that do not go with the dtypes.
    """
    of_input, of_weights = names
    for name, dtype in ((of_input, input_dtype), (of_weights, weight_dtype)):
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name}: expected a torch.dtype, got {type(dtype).__name__}")
    if weight_dtype in _FLOATS:
        _refuse_quantization(of_weights, f"{str(input_dtype).removeprefix('torch.')}_unquantized")
    if weight_dtype is torch.float8_e4m3fn:
        _refuse_quantization(of_weights, "mxfp8_mxfp8" if use_mxfp8_act_scaling else "fp8_fp8")
    if use_w4_group_scaling or weight_dtype is torch.uint8:
        _check_group_scaling(input_dtype, weight_dtype, use_w4_group_scaling, use_mxfp8_act_scaling, names)
        return Mode.BF16
    if weight_dtype is not torch.int64:
        raise TypeError(f"{of_weights}: expected torch.int64, a view of packed MXFP4, got {weight_dtype}")
    of_nvfp4 = len(Mode.NVFP4.scales)
    if input_dtype in CODES or (num_scales == of_nvfp4 and input_dtype in HALVES):
        if on_cpu and not use_mxfp8_act_scaling:
            return Mode.NVFP4
        _refuse_quantization("quant_scales" if num_scales else of_input, "nvfp4_nvfp4")
    if num_scales == of_nvfp4:
        if on_cpu and not use_mxfp8_act_scaling:
            raise TypeError(
                f"{of_input}: expected torch.bfloat16, torch.float16, or NVFP4's torch.uint8 or torch.int64 for "
                f"{Mode.NVFP4.words}, which six quant_scales mean, got {input_dtype}"
            )
        _refuse_quantization("quant_scales", "nvfp4_nvfp4")
    if input_dtype not in (torch.float8_e4m3fn, *HALVES):
        raise TypeError(f"{of_input}: expected torch.float8_e4m3fn, torch.bfloat16 or torch.float16, got {input_dtype}")
    return Mode.FP8 if input_dtype is torch.float8_e4m3fn and not use_mxfp8_act_scaling else Mode.MXFP8


def refuse_on(mode: Mode, device: torch.device) -> None:
    """Refuses bf16 x MXFP4 on a GPU that this wheel has other kernels for, before weights are prepared for it.

    Raises:
        NotImplementedError: there are none; says which wheel has them.
    """
    if mode is not Mode.BF16 or device.type != "cuda":
        return
    if tiles_of("mxfp8", device.index) and not tiles_of("bf16", device.index):
        lacks = loading.manifest().refusal(wheel.profile(), "mxfp4_bf16") or "no tile that was built has bf16 rows"
        raise NotImplementedError(f"use_w4_group_scaling: {lacks}")


def _check_group_scaling(
    input_dtype: torch.dtype, weight_dtype: torch.dtype, group_scaling: bool, mxfp8: bool, names: tuple[str, str]
) -> None:
    of_input, of_weights = names
    mode = "bf16 x MXFP4 (use_w4_group_scaling=True)"
    if not group_scaling:
        raise ValueError(
            f"use_w4_group_scaling: expected True with uint8 {of_weights}, which are those of bf16 x MXFP4, got False; "
            "MXFP4 for other activations comes as views of int64"
        )
    if weight_dtype is not torch.uint8:
        raise TypeError(
            f"{of_weights}: expected torch.uint8 for {mode}, as interleave_moe_weights_for_sm90_mixed_gemm makes them, "
            f"got {weight_dtype}"
        )
    if mxfp8:
        raise ValueError(f"use_mxfp8_act_scaling: expected False for {mode}, got True")
    if input_dtype is not torch.bfloat16:
        # FlashInfer 0.7.2.post1, flashinfer_cutlass_fused_moe_binding.cu: its weights' layout does not go with float16.
        more = "; activation_format='fp16' of mxfp4_moe's own call takes it" if input_dtype is torch.float16 else ""
        raise TypeError(f"{of_input}: expected torch.bfloat16 for {mode}, as FlashInfer, got {input_dtype}{more}")


def _refuse_quantization(argument: str, quantization: str) -> None:
    manifest = loading.manifest()
    profile = (wheel.read_report() or {}).get("profile") or manifest.default_profile
    refusal = manifest.refusal(profile, quantization)
    if refusal is None:  # the wheel has it, and this call has not
        refusal = f"quantization {quantization!r} is here for CPU tensors alone; fused_moe has it on GPUs too"
    raise NotImplementedError(f"{argument}: {refusal}")
