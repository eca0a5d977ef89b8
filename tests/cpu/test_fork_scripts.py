"""Scripts for the SM120 fork, as they run on CPU tensors; on a GPU: tests/gpu/test_dropin.py."""

from __future__ import annotations

import fork_scripts
import pytest
import torch
from fork_scripts import dummies

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import weight_cache

CPU = torch.device("cpu")


def test_tile_expansion() -> None:
    fork_scripts.tile_expansion(CPU)


def test_smoke() -> None:
    fork_scripts.smoke(CPU)


def test_fp4_smem_correctness() -> None:
    fork_scripts.fp4_smem_correctness(CPU)


def test_benchmark_sm120_tiles() -> None:
    found = fork_scripts.benchmark_sm120_tiles(CPU, (1, 8))
    assert [tile for tile, tokens, _ in found if tokens == 8] == list(fi.SM120_SUPPORTED_TILE_MN)
    assert all(microseconds > 0 for *_, microseconds in found)


class TestOrders:
    """The module's call by position, as before 0.7.2 and since."""

    def arguments(self) -> list[object]:
        tensors = dummies(2, 1, 1, CPU)
        names = ("out", "x", "token_selected_experts", "token_final_scales", "fc1_expert_weights")
        head = [tensors[name] for name in names]
        return [*head, None, tensors["fc2_expert_weights"], None, torch.bfloat16, tensors["quant_scales"], *[None] * 4]

    def test_since(self) -> None:
        module = fi.get_cutlass_fused_moe_module()
        ranks = (None, None, None, True, 1, 0, 1, 0, 1, 0)
        assert not module.cutlass_fused_moe(*self.arguments(), *ranks, activation_type=3)[0].any()
        with pytest.raises(NotImplementedError, match="^cluster_size: this library has no clusters"):
            module.cutlass_fused_moe(*self.arguments(), *ranks[:8], 2)

    def test_before(self) -> None:
        module = fi.get_cutlass_fused_moe_module()
        with pytest.raises(NotImplementedError, match="^cluster_size: this library has no clusters"):
            module.cutlass_fused_moe(*self.arguments(), 1, 0, 1, 0, 2)

    def test_refuses(self) -> None:
        module = fi.get_cutlass_fused_moe_module()
        with pytest.raises(TypeError, match="^cutlass_fused_moe: got tp_size by position and by name"):
            module.cutlass_fused_moe(*self.arguments(), 1, tp_size=1)
        with pytest.raises(TypeError, match="^cutlass_fused_moe: expected at most 33 arguments, got 44"):
            module.cutlass_fused_moe(*self.arguments(), *[1] * 30)
        with pytest.raises(TypeError, match="unexpected keyword argument 'tactic'"):
            module.cutlass_fused_moe(*self.arguments(), tactic=1)


def test_weights_of_dead_calls_are_gone() -> None:
    fork_scripts.smoke(CPU)
    assert not weight_cache._layers
