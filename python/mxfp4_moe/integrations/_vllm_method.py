"""vLLM's method for a layer of experts: its own weights and loading, our layout behind them, our kernels to run.

The parameters stay vLLM's: after loading, w13_weight and w2_weight hold [E, bytes], codes and scales of an expert in
one row, and the two biases are float32. What float16 activations need to know of an expert's weights are parameters
too, w13_fp16_factors and w2_fp16_factors. So whatever moves experts by rows (EPLB) or tensors by names (sleep, reload,
sharded states) works as before, and nothing that the kernels read is ever made from what was there earlier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import mxfp4_w4a16_moe_quant_config
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod, Mxfp4MoEMethod
from vllm.model_executor.utils import replace_parameter

from ..engines import linear_first_expert, prepare_layer, wrap_layer
from ..formats import BLOCK
from ..weights import MoEWeights
from ._engines.verify import verify_layer
from ._vllm_decide import ENGINE, Decision

_SCALES = ("w13_weight_scale", "w2_weight_scale")
_WEIGHTS = ("w13_weight", "w2_weight")
_FACTORS = ("w13_fp16_factors", "w2_fp16_factors")
_verified: set[str] = set()


class _Method:
    """Everything but the weights, which are the base's; `GptOssMethod` and `Mxfp4Method` name theirs."""

    supports_pre_processed_weights = False
    moe: Any
    moe_kernel: Any
    moe_quant_config: Any

    def __init__(self, moe: Any, decision: Decision) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # not the base's own, which chooses one of vLLM's kernels
        self.decision = decision
        self.experts_cls = decision.experts
        self.weights: MoEWeights | None = None
        self._names = _WEIGHTS + (_FACTORS if decision.activation_format == "fp16" else ())
        self._bound: list[int] = []  # where they were when `weights` was made of them
        self._written: list[int] = []  # torch's counts of writes to them, when last looked at

    @property
    def supports_eplb(self) -> bool:
        return True

    @property
    def skip_forward_padding(self) -> bool:
        return False

    @property
    def has_unpadded_output(self) -> bool:
        return False

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: Any, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """Whole blocks of 32 in both; vLLM pads a rank's part of I with zeros."""
        hidden, inter = FusedMoEMethodBase.maybe_roundup_sizes(
            self,
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size_per_partition,
            act_dtype=act_dtype,
            moe_parallel_config=moe_parallel_config,
        )
        return hidden + -hidden % BLOCK, inter + -inter % BLOCK

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """To vLLM the activations are 16-bit: nobody but our kernels quantizes them."""
        return mxfp4_w4a16_moe_quant_config(w1_scale=None, w2_scale=None)

    def process_weights_after_loading(self, layer: Any) -> None:
        """One layer's raw weights into ours; the raw ones go matrix by matrix, as they are read."""
        decision, first = self.decision, linear_first_expert(layer.expert_map)
        numbers = {name: getattr(decision, name) for name in ("activation", "alpha", "beta", "limit")}
        fresh = self._fresh(layer, numbers) if self._verifies() else None
        weights = prepare_layer(
            layer.w13_weight.data,
            layer.w13_weight_scale.data,
            layer.w2_weight.data,
            layer.w2_weight_scale.data,
            w13_bias=_data(layer, "w13_bias"),
            w2_bias=_data(layer, "w2_bias"),
            gate_up_order=decision.order,
            first_expert=first or 0,
            num_global_experts=layer.global_num_experts,
            activation_format=decision.activation_format,
            release=True,
            **numbers,
        )
        for name, tensor in (
            ("w13_weight", weights.w13),
            ("w2_weight", weights.w2),
            ("w13_bias", weights.w13_bias),
            ("w2_bias", weights.w2_bias),
        ):
            if tensor is not None:
                replace_parameter(layer, name, tensor)
        if decision.activation_format == "fp16":
            for name, tensor in zip(_FACTORS, weights.fp16_factors(), strict=True):
                replace_parameter(layer, name, tensor)
        for name in _SCALES:
            replace_parameter(layer, name, None)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=decision.experts.is_monolithic(),
        )
        self.moe_kernel = mk.FusedMoEKernel(
            finalize, decision.experts(moe_config=self.moe, quant_config=self.moe_quant_config)
        )
        self.moe_kernel.fused_experts.bind(
            weights, shifted=first is not None, activation_format=decision.activation_format
        )
        self._follow(layer, weights)
        if fresh is not None:
            self._verify(layer, fresh)

    def apply(self, layer: Any, *arguments: Any, **keywords: Any) -> Any:
        self._keep_up(layer)
        return super().apply(layer, *arguments, **keywords)  # type: ignore[misc]

    def apply_monolithic(self, layer: Any, *arguments: Any, **keywords: Any) -> Any:
        self._keep_up(layer)
        return super().apply_monolithic(layer, *arguments, **keywords)  # type: ignore[misc]

    def _keep_up(self, layer: Any) -> None:
        """Parameters that were put elsewhere since (offloaded, reloaded) are where the kernels look for them."""
        if torch.compiler.is_compiling():
            return
        assert self.weights is not None
        if self._places(layer) != self._bound:
            self._follow(layer, self.weights)
        elif self.decision.activation_format == "fp16":
            self._check_writes(layer, self.weights)

    def _check_writes(self, layer: Any, weights: MoEWeights) -> None:
        """Factors that somebody left out, who wrote prepared weights by their names, are made from these."""
        now, seen = self._versions(layer), self._written
        self._written = now
        if now[: len(_WEIGHTS)] != seen[: len(_WEIGHTS)] and now[len(_WEIGHTS) :] == seen[len(_WEIGHTS) :]:
            weights.update_fp16_factors()

    def _versions(self, layer: Any) -> list[int]:
        tensors = [getattr(layer, name) for name in self._names]
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]

    def _places(self, layer: Any) -> list[int]:
        return [getattr(layer, name).data_ptr() for name in self._names]

    def _follow(self, layer: Any, weights: MoEWeights) -> None:
        tensors = (layer.w13_weight.data, layer.w2_weight.data, _data(layer, "w13_bias"), _data(layer, "w2_bias"))
        factors = None
        if self.decision.activation_format == "fp16":
            factors = layer.w13_fp16_factors.data, layer.w2_fp16_factors.data
        self.weights = wrap_layer(weights, *tensors, fp16_factors=factors)
        self._bound, self._written = self._places(layer), self._versions(layer)
        self.moe_kernel.fused_experts.weights = self.weights

    # ---- the check at start-up, MXFP4_MOE_VERIFY=1 ---------------------------------------------------------------

    def _verifies(self) -> bool:
        return self.decision.verify and ENGINE.name not in _verified

    def _fresh(self, layer: Any, numbers: dict[str, Any]) -> MoEWeights:
        """The layer prepared on the CPU from the raw tensors, and moved: another way to the same bytes."""
        names = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale", "w13_bias", "w2_bias")
        raw = {name.replace("_weight", ""): data.cpu() for name in names if (data := _data(layer, name)) is not None}
        made: MoEWeights = MoEWeights.from_mxfp4(**raw, gate_up_order=self.decision.order, **numbers)
        return made.to(layer.w13_weight.device, self.decision.activation_format)

    def _verify(self, layer: Any, fresh: MoEWeights) -> None:
        experts, device = self.moe_kernel.fused_experts, layer.w13_weight.device
        ranked = replace(
            fresh, first_expert=experts.weights.first_expert, num_global_experts=experts.weights.num_global_experts
        )

        def run(hidden: Any, topk_weights: Any, topk_ids: Any, router_logits: Any) -> Any:
            if experts.is_monolithic():
                return experts.apply(hidden, layer.w13_weight, layer.w2_weight, router_logits)
            output = torch.empty_like(hidden)
            maps = (self.moe.num_experts, layer.expert_map)
            experts.apply(output, hidden, layer.w13_weight, layer.w2_weight, topk_weights, topk_ids, None, *maps)
            return output

        verify_layer(
            ENGINE,
            run,
            ranked,
            layer.layer_name,
            dtype=self.moe.in_dtype,
            top_k=self.moe.experts_per_token,
            expert_map=None if experts.shifted else layer.expert_map,
            keywords=experts.keywords,
            device=device,
        )
        _verified.add(ENGINE.name)


class GptOssMethod(_Method, GptOssMxfp4MoEMethod):  # type: ignore[misc]
    """For gpt-oss: gate and up rows interleaved."""

    gpt_oss = True

    def __init__(self, moe: Any, decision: Decision) -> None:
        super().__init__(moe, decision)
        self.weight_dtype = "gpt_oss_mxfp4"  # by which vLLM's gpt-oss finds how to load


class Mxfp4Method(_Method, Mxfp4MoEMethod):  # type: ignore[misc]
    """For other checkpoints: all gates, then all ups."""

    gpt_oss = False

    def __init__(self, moe: Any, decision: Decision) -> None:
        super().__init__(moe, decision)
        self.weight_dtype = "mxfp4"


def _data(layer: Any, name: str) -> Any:
    parameter = getattr(layer, name, None)
    return None if parameter is None else parameter.data
