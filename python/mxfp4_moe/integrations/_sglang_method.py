"""A layer of experts in SGLang: parameters and loading are SGLang's, everything from then on is ours."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod
from torch import Tensor, nn

from .._call.fused_moe import fused_moe
from ..engines import prepare_layer, wrap_layer
from ..formats import BLOCK
from ..weights import GateUpOrder, MoEWeights
from ._engines import Settings, say
from ._engines.table import SGLANG
from ._engines.verify import verify_layer
from ._sglang_decide import activations

_RAW = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
_verified: list[bool] = []


class Method(Mxfp4MoEMethod):  # type: ignore[misc]
    """SGLang's method for MXFP4 experts with our layer in place of its runners.

    Args:
        prefix: the layer's name.
        settings: the user's.
    """

    def __init__(self, prefix: str, settings: Settings) -> None:
        super().__init__(prefix=prefix)
        self._settings = settings
        self._format = activations(settings).format

    def create_weights(self, layer: nn.Module, *args: Any, intermediate_size_per_partition: int, **more: Any) -> None:
        """SGLang's parameters, with room for a rank's whole blocks of 32; what is not loaded is zero.

        SGLang's loader cuts I between blocks, so that a rank may have more rows than I / ranks.
        """
        room = -(-intermediate_size_per_partition // BLOCK) * BLOCK
        super().create_weights(layer, *args, intermediate_size_per_partition=room, **more)

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """SGLang's call with what stands between the GEMMs; there is no runner, `apply` is all.

        Raises:
            NotImplementedError: a layer that is not computed as gpt-oss's are.
        """
        config = moe_runner_config
        self.moe_runner_config = config
        faults = {
            f"activation {config.activation} with alpha {config.gemm1_alpha}": config.gemm1_alpha is None
            or config.activation != "silu"
            or not config.is_gated,
            "router weights on the input": config.apply_router_weight_on_input,
            "outputs of experts that are not summed": config.no_combine,
            "fused shared experts": bool(config.num_fused_shared_experts),
        }
        wrong = [words for words, is_so in faults.items() if is_so]
        if wrong:
            raise NotImplementedError(
                f"{self.prefix}: expected a layer as gpt-oss has it, got {wrong[0]}; start SGLang with another "
                "--moe-runner-backend"
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """SGLang's call after loading: one matrix after the other in our layout, and each raw one goes."""
        config = self.moe_runner_config
        interleaved = getattr(config, "gate_up_interleaved", True)
        raw = {name: getattr(layer, name).data for name in _RAW}
        biases = [getattr(layer, name, None) for name in ("w13_weight_bias", "w2_weight_bias")]
        given: dict[str, Any] = {
            "w13_bias": None if biases[0] is None else biases[0].data,
            "w2_bias": None if biases[1] is None else biases[1].data,
            "gate_up_order": GateUpOrder.INTERLEAVED if interleaved else GateUpOrder.GATE_UP,
            "alpha": float(config.gemm1_alpha),
            "limit": None if config.gemm1_clamp_limit is None else float(config.gemm1_clamp_limit),
            "num_global_experts": int(config.num_experts),
        }
        tensors = (raw["w13_weight"], raw["w13_weight_scale"], raw["w2_weight"], raw["w2_weight_scale"])
        again = self._copy_to_verify(tensors)
        weights = prepare_layer(*tensors, **given, activation_format=self._activation_format, release=True)
        for name in _RAW:
            delattr(layer, name)
        # As parameters [E, bytes], so that what moves experts between ranks finds them.
        layer.w13_weight = nn.Parameter(weights.w13, requires_grad=False)
        layer.w2_weight = nn.Parameter(weights.w2, requires_grad=False)
        layer.w13_weight_bias = _parameter(weights.w13_bias)
        layer.w2_weight_bias = _parameter(weights.w2_bias)
        layer.mxfp4_moe_weights = wrap_layer(
            weights,
            layer.w13_weight.data,
            layer.w2_weight.data,
            None if layer.w13_weight_bias is None else layer.w13_weight_bias.data,
            None if layer.w2_weight_bias is None else layer.w2_weight_bias.data,
        )
        layer._mxfp4_backend = "mxfp4_moe"
        if again is not None:
            made = MoEWeights.from_mxfp4(*again, **_without(given, "num_global_experts"))
            self._verify(layer, made.to(made.device, self._activation_format))

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """SGLang's call for a batch: hidden states [T, H], standard top-k, ids of this rank's experts, -1 elsewhere."""
        topk = dispatch_output.topk_output
        output = self._run(layer, dispatch_output.hidden_states, topk.topk_weights, topk.topk_ids)
        return StandardCombineInput(hidden_states=output)

    def _run(self, layer: Any, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        output = fused_moe(
            hidden_states.contiguous(),
            topk_weights.to(torch.float32).contiguous(),
            topk_ids.contiguous(),
            layer.mxfp4_moe_weights,
            **self._keywords(),
        )
        factor = self.moe_runner_config.routed_scaling_factor
        return output if factor is None or factor == 1.0 else output.mul_(factor)

    @property
    def _activation_format(self) -> str:
        return "mxfp8" if self._format == "mxfp8" else "bf16"

    def _keywords(self) -> dict[str, Any]:
        if self._activation_format == "mxfp8":  # the default of `fused_moe`
            return {}
        return {"activation_format": self._activation_format}

    def _copy_to_verify(self, tensors: tuple[Tensor, ...]) -> list[Tensor] | None:
        """The raw tensors again, of the first layer, where the user asked for the check."""
        if not self._settings.verify or _verified:
            return None
        _verified.append(True)
        return [tensor.clone() for tensor in tensors]

    def _verify(self, layer: Any, weights: MoEWeights) -> None:
        config = self.moe_runner_config
        if config.num_local_experts != config.num_experts:
            say(SGLANG, f"mxfp4-moe cannot verify {self.prefix}, of which this process has a part")
            return
        factor = config.routed_scaling_factor
        if factor not in (None, 1.0):
            say(SGLANG, f"mxfp4-moe cannot verify {self.prefix}, whose output is scaled by {factor}")
            return
        verify_layer(
            SGLANG,
            lambda hidden, topk_weights, topk_ids, logits: self._run(layer, hidden, topk_weights, topk_ids),
            weights,
            self.prefix,
            dtype=torch.bfloat16,
            top_k=int(config.top_k),
            device=weights.device,
            keywords=self._keywords(),
        )


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}
