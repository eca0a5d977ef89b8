"""FlashInfer's module of one tile, as scripts for SM120 take it: nothing is compiled, and its call is the drop-in's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._call.modules import FusedMoEModule, load_module_tile, module_tile
from .._call.selection import DEFAULT_TILE_MN
from ..tiles import Tile
from .call import cutlass_fused_moe
from .workspace import cutlass_fused_moe_workspace_size

# What follows swiglu_limit by position: a tensor or None where the caller follows 0.7.2, a number where one follows
# those versions that had nothing in between.
_NEW_ORDER = (
    "clamped_relu2_limit",
    "situ_beta",
    "situ_linear_beta",
    "swizzled_input_sf",
    "tp_size",
    "tp_rank",
    "ep_size",
    "ep_rank",
    "cluster_size",
    "cluster_rank",
    "enable_alltoall",
    "use_deepseek_fp8_block_scale",
    "use_w4_group_scaling",
    "use_mxfp8_act_scaling",
    "min_latency_mode",
    "tune_max_num_tokens",
    "enable_pdl",
    "activation_type",
    "use_packed_weights",
    "use_fused_finalize",
    "use_wfp4afp8_humming",
    "profile_ids",
    "workspace_buffer",
)
_OLD_ORDER = _NEW_ORDER[4:]


class CutlassFusedMoEModule(FusedMoEModule):
    """One tile of the wheel with FlashInfer's calls; from `get_cutlass_fused_moe_module`."""

    def cutlass_fused_moe(
        self,
        output: Tensor,
        input: Tensor,
        token_selected_experts: Tensor,
        token_final_scales: Tensor | None,
        fc1_expert_weights: Tensor,
        fc1_expert_biases: Tensor | None,
        fc2_expert_weights: Tensor,
        fc2_expert_biases: Tensor | None,
        output_dtype: torch.dtype,
        quant_scales: list[Tensor],
        input_sf: Tensor | None = None,
        swiglu_alpha: Tensor | None = None,
        swiglu_beta: Tensor | None = None,
        swiglu_limit: Tensor | None = None,
        *more: Any,
        **named: Any,
    ) -> list[Tensor]:
        """`flashinfer_api.cutlass_fused_moe` with this tile, and with the order of arguments that such modules have.

        Args:
            output: [T, H] of output_dtype, written to.
            more: by position as in FlashInfer 0.7.2 (clamped_relu2_limit, situ_beta, situ_linear_beta,
                swizzled_input_sf, tp_size, ...), or, where the first is a number, from tp_size on, as before that.
            named: the other arguments of `flashinfer_api.cutlass_fused_moe`.

        Returns:
            [output].
        """
        old = bool(more) and isinstance(more[0], int)
        order = _OLD_ORDER if old else _NEW_ORDER
        if len(more) > len(order):
            raise TypeError(f"cutlass_fused_moe: expected at most {14 + len(order)} arguments, got {14 + len(more)}")
        by_position = dict(zip(order, more, strict=False))
        if twice := sorted(by_position.keys() & named.keys()):
            raise TypeError(f"cutlass_fused_moe: got {twice[0]} by position and by name")
        return cutlass_fused_moe(
            input,
            token_selected_experts,
            token_final_scales,
            fc1_expert_weights,
            fc2_expert_weights,
            output_dtype,
            quant_scales,
            fc1_expert_biases,
            fc2_expert_biases,
            input_sf,
            swiglu_alpha,
            swiglu_beta,
            swiglu_limit,
            output=output,
            tile_mn=self.tile.mn,
            **by_position,
            **named,
        )

    cutlass_fused_moe_workspace_size = staticmethod(cutlass_fused_moe_workspace_size)


def get_cutlass_fused_moe_module(
    backend: str = "120", use_fast_build: bool | tuple[int, int] = False, tile_mn: tuple[int, int] = DEFAULT_TILE_MN
) -> CutlassFusedMoEModule:
    """The module of one prebuilt tile, the same object for the same tile; nothing is compiled.

    With a CUDA build of torch the tile is loaded now, otherwise on first use.

    Args:
        backend: "120" or "121", the block-scaled MXFP8 x MXFP4 kernels: the same for SM120, SM121 and, in this wheel,
            SM90, for which "90" may stand.
        use_fast_build: taken, as FlashInfer's, and there is nothing to build. A pair in its place is tile_mn.
        tile_mn: (M, N). Native tiles have M % 64 == 0, swapped ones M in 8, 16, 32 with N >= 64; N is 8 to 256; and
            the tile must be in the wheel's manifest.

    Raises:
        TypeError: tile_mn is no pair of integers.
        ValueError: another backend, or a tile that breaks these rules; the message names the rule.
        RuntimeError: the tile's extension does not fit this torch.
    """
    if isinstance(use_fast_build, (tuple, list)):
        tile_mn = use_fast_build
    return _module(module_tile(backend, tile_mn))


@functools.cache
def _module(tile: Tile) -> CutlassFusedMoEModule:
    load_module_tile(tile)
    return CutlassFusedMoEModule(tile)
