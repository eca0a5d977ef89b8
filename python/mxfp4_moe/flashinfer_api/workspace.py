"""FlashInfer's workspace: none is needed here, and what is given is held to its rules."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import describe
from .._call.checks import MAX_EXPERTS, MAX_SLOTS
from .._checkpoints.options import check_int
from ..formats import BLOCK
from .activation_type import ActivationType, activation_of
from .mixed_gemm import LAYER_MULTIPLE
from .modes import HALVES, Mode, mode_of, refuse_modes, refuse_on

_BYTES = (torch.uint8, torch.int8)
_ALIGNMENT = 128  # of FlashInfer's buffers; torch's CUDA allocator gives more


def cutlass_fused_moe_workspace_size(
    max_num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts_total: int,
    top_k: int,
    *,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    output_dtype: torch.dtype = torch.bfloat16,
    activation_type: ActivationType | int = ActivationType.Swiglu,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    min_latency_mode: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_fused_finalize: bool = True,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    device: torch.device | str | None = None,
    backend: str = "cutlass",
) -> int:
    """Bytes that `cutlass_fused_moe` needs as workspace_buffer: 0, its scratch comes from torch's caching allocator.

    What the call refuses for sizes, dtypes and modes like these is refused here too, with the same words.

    Args:
        max_num_tokens, hidden_size, intermediate_size, num_experts_total, top_k: of the layer; experts of all ranks,
            the intermediate size of this one.
        x_dtype, weight_dtype: of input and fc1_expert_weights.
        device: where the layer would run; CUDA, CPU, or None.
        others: as `cutlass_fused_moe`.

    Raises:
        NotImplementedError: a mode or a quantization that is not here.
        TypeError: an argument of another type.
        ValueError: a size that the layer does not take, or a rank outside its group.
    """
    refuse_modes(
        backend=backend,
        use_deepseek_fp8_block_scale=use_deepseek_fp8_block_scale,
        min_latency_mode=min_latency_mode,
        use_packed_weights=use_packed_weights,
        use_wfp4afp8_humming=use_wfp4afp8_humming,
    )
    activation_of(activation_type)
    mode = mode_of(
        x_dtype,
        weight_dtype,
        use_w4_group_scaling=use_w4_group_scaling,
        use_mxfp8_act_scaling=use_mxfp8_act_scaling,
        names=("x_dtype", "weight_dtype"),
        on_cpu=device is not None and torch.device(device).type == "cpu",
    )
    check_output_dtype(output_dtype, mode)
    sizes = {
        "max_num_tokens": max_num_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts_total": num_experts_total,
        "top_k": top_k,
        "tp_size": tp_size,
        "ep_size": ep_size,
    }
    for name, size in sizes.items():
        check_int(name, size)
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        multiple = LAYER_MULTIPLE if mode in (Mode.BF16, Mode.NVFP4) else BLOCK
        if size % multiple:
            raise ValueError(f"{name}: expected a multiple of {multiple}, got {size}")
    for name, rank, size in (("tp_rank", tp_rank, tp_size), ("ep_rank", ep_rank, ep_size)):
        check_int(name, rank)
        if not 0 <= rank < size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {rank}")
    if num_experts_total % ep_size:
        raise ValueError(f"num_experts_total: expected a multiple of ep_size = {ep_size}, got {num_experts_total}")
    if num_experts_total // ep_size > MAX_EXPERTS:
        raise ValueError(
            f"num_experts_total: expected at most {MAX_EXPERTS} experts on a rank, got {num_experts_total // ep_size}"
        )
    if max_num_tokens * top_k > MAX_SLOTS:
        raise ValueError(
            f"max_num_tokens: expected at most {MAX_SLOTS} slots (tokens * top_k), got {max_num_tokens} * {top_k}"
        )
    if device is not None:
        place = torch.device(device)
        if place.type not in ("cuda", "cpu"):
            raise ValueError(f"device: expected a CUDA or CPU device, got {device}")
        if place.type == "cuda" and torch.cuda.is_available():
            refuse_on(mode, torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index))
    return 0


def check_output_dtype(output_dtype: torch.dtype, mode: Mode) -> None:
    """Raises a ValueError, unless it is a dtype that a layer can have as its output's."""
    if mode is Mode.BF16 and output_dtype is not torch.bfloat16:
        raise ValueError(f"output_dtype: expected torch.bfloat16 with use_w4_group_scaling=True, got {output_dtype}")
    if output_dtype not in HALVES:
        raise ValueError(f"output_dtype: expected torch.bfloat16 or torch.float16, got {output_dtype}")


def check_workspace(buffer: Tensor | None, device: torch.device) -> None:
    """Checks the buffer that a caller gives, though nothing is written to it.

    Raises:
        TypeError: no tensor of bytes.
        ValueError: another shape, device or stride, or data not aligned to 128 bytes on a GPU.
    """
    if buffer is None:
        return
    if not isinstance(buffer, Tensor):
        raise TypeError(f"workspace_buffer: expected a uint8 or int8 tensor, or None, got {type(buffer).__name__}")
    if buffer.dtype not in _BYTES:
        raise TypeError(f"workspace_buffer: expected uint8 or int8, got {describe(buffer)}")
    if buffer.dim() != 1:
        raise ValueError(f"workspace_buffer: expected one dimension, got {describe(buffer)}")
    if buffer.device != device:
        raise ValueError(f"workspace_buffer: expected a tensor on {device}, where input is, got one on {buffer.device}")
    if not buffer.is_contiguous():
        raise ValueError(f"workspace_buffer: expected a contiguous tensor, got strides {list(buffer.stride())}")
    if buffer.is_cuda and buffer.data_ptr() % _ALIGNMENT:
        past = buffer.data_ptr() % _ALIGNMENT
        raise ValueError(f"workspace_buffer: expected data aligned to {_ALIGNMENT} bytes, got {past} bytes past that")
