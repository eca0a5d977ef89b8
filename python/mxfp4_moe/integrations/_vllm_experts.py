"""Our kernels as vLLM's two kinds of experts: behind its router (modular), or in one call with ours (monolithic).

Modular experts take tokens in the standard format, so every prepare/finalize of that format can stand around them: no
communication, all-gather and reduce-scatter, DeepEP high throughput. The sum over a token's experts is made inside.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static

from .._call.checks import MAX_EXPERTS
from .._call.fused_moe import fused_moe
from ..engines import local_ids
from ..routers import MAX_TOP_K
from ..routing import fused_moe_from_logits
from ..weights import MoEWeights

_NORMALIZES = {  # our router: softmax over the chosen, or over all
    RoutingMethodType.Renormalize: True,
    RoutingMethodType.RenormalizeNaive: True,
    RoutingMethodType.Default: False,
}


class _Experts:
    """What both kinds have in common.

    Attributes:
        weights: the layer's; the method sets them, and keeps them in step with the layer's parameters.
        shifted: the experts here are consecutive, so ids need no map.
        keywords: what `fused_moe` takes beside tensors.
    """

    weights: MoEWeights
    shifted: bool
    keywords: dict[str, Any]

    def bind(self, weights: MoEWeights, *, shifted: bool, activation_format: str) -> None:
        """Gives the experts their layer."""
        self.weights, self.shifted = weights, shifted
        self.keywords = {} if activation_format == "mxfp8" else {"activation_format": activation_format}

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # _vllm_decide.py has looked at it

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key == kMxfp4Static and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return True  # _vllm_decide.py has translated it

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True  # a token's bits depend on nothing but that token, by design


class ModularExperts(_Experts, mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """Behind vLLM's router, whichever it is."""

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def moe_problem_size(self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
        """(E, M, N, K, k), which prepared weights' shapes do not show."""
        return w1.shape[0], a1.shape[0], self.weights.w13_rows, self.weights.hidden_size, topk_ids.shape[1]

    def workspace_shapes(self, M: int, N: int, K: int, *rest: Any) -> tuple[Any, Any, Any]:
        """None: the kernels bring their own scratch, and write the output."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        *rest: Any,
        **more: Any,
    ) -> None:
        """Writes the sum over each token's experts here into output."""
        ids = topk_ids
        if ids.dtype not in (torch.int32, torch.int64):
            ids = ids.to(torch.int64)
        if not self.shifted:
            assert expert_map is not None
            ids = local_ids(ids, expert_map)
        fused_moe(
            hidden_states.contiguous(),
            topk_weights.to(torch.float32).contiguous(),
            ids.contiguous(),
            self.weights,
            output=output,
            **self.keywords,
        )


class MonolithicExperts(_Experts, mk.FusedMoEExpertsMonolithic):  # type: ignore[misc]
    """From the router's logits, in one call."""

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        """Only where every rank has every token, and all ranks the same experts or their parts."""
        parallel = moe_parallel_config
        return not (parallel.use_ep or parallel.use_all2all_kernels or parallel.enable_eplb or parallel.dp_size > 1)

    @staticmethod
    def _supports_routing_method(routing_method: Any, weight_key: Any, activation_key: Any) -> bool:
        return routing_method in _NORMALIZES

    @staticmethod
    def _supports_router_logits_dtype(router_logits_dtype: Any, routing_method: Any) -> bool:
        return True

    @staticmethod
    def is_supported_config(cls: Any, moe_config: Any, *rest: Any) -> tuple[bool, str | None]:
        """vLLM's own check, and our router's limits."""
        if moe_config.experts_per_token > MAX_TOP_K or moe_config.num_experts > MAX_EXPERTS:
            return False, f"kernel does not support top {moe_config.experts_per_token} of {moe_config.num_experts}"
        answer: tuple[bool, str | None] = mk.FusedMoEExpertsMonolithic.is_supported_config(cls, moe_config, *rest)
        return answer

    def apply(
        self, hidden_states: Tensor, w1: Tensor, w2: Tensor, router_logits: Tensor, *rest: Any, **more: Any
    ) -> Tensor:
        """The layer's output, [T, H]."""
        return fused_moe_from_logits(
            hidden_states.contiguous(),
            router_logits.contiguous(),
            self.moe_config.experts_per_token,
            self.weights,
            renormalize=_NORMALIZES[self.moe_config.routing_method],
            **self.keywords,
        )
