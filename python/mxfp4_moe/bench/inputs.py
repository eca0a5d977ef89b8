"""What every implementation is given: one layer's weights as a checkpoint stores them, and calls to make with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import MoEWeights
from .shapes import MoEShape

# Of E2M1's codes, uniformly random, the root mean square is 2.9. With these E8M0 bytes (2^-9 to 2^-6) and K = 2880 the
# first GEMM gives values of about 1.4, as a layer's are: some are clamped, most are not.
_SCALE_LOW, _SCALE_HIGH = 118, 121


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """MXFP4 weights of one layer, gate and up rows interleaved as in gpt-oss; `MoEWeights.from_mxfp4` names them."""

    shape: MoEShape
    w13: Tensor  # uint8 [E, 2I, H/2], low nibble = even k
    w13_scale: Tensor  # uint8 [E, 2I, H/32]
    w2: Tensor  # uint8 [E, H, I/2]
    w2_scale: Tensor  # uint8 [E, H, I/32]
    w13_bias: Tensor  # bfloat16 [E, 2I]
    w2_bias: Tensor  # bfloat16 [E, H]

    def prepared(self, activation_format: str = "mxfp8") -> MoEWeights:
        """As this package wants them for calls with these activations."""
        weights = MoEWeights.from_mxfp4(
            self.w13, self.w13_scale, self.w2, self.w2_scale, w13_bias=self.w13_bias, w2_bias=self.w2_bias
        )
        return weights.to(self.w13.device, activation_format)


@dataclass(frozen=True, kw_only=True)
class CallInputs:
    """One call: T tokens and the router's logits of each. No two logits of a token are equal, in bfloat16 too."""

    hidden_states: Tensor  # bfloat16 [T, H]
    logits: Tensor  # float32 [T, E]
    active_experts: int  # experts that this call's tokens pick

    @property
    def tokens(self) -> int:
        return self.hidden_states.shape[0]


def layer_tensors(shape: MoEShape, device: torch.device, seed: int = 0) -> LayerTensors:
    """Random weights of a plausible size; about 1.7 GB for gpt-oss-120b."""
    g = torch.Generator(device).manual_seed(seed)
    e, h, i = shape.experts, shape.hidden, shape.intermediate

    def integers(low: int, high: int, *sizes: int) -> Tensor:
        return torch.randint(low, high + 1, sizes, dtype=torch.uint8, generator=g, device=device)

    def bias(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float32, device=device).mul_(0.2).bfloat16()

    return LayerTensors(
        shape=shape,
        w13=integers(0, 255, e, 2 * i, h // 2),
        w13_scale=integers(_SCALE_LOW, _SCALE_HIGH, e, 2 * i, h // 32),
        w2=integers(0, 255, e, h, i // 2),
        w2_scale=integers(_SCALE_LOW, _SCALE_HIGH, e, h, i // 32),
        w13_bias=bias(e, 2 * i),
        w2_bias=bias(e, h),
    )


def call_inputs(shape: MoEShape, tokens: int, device: torch.device, seed: int) -> CallInputs:
    """Normal hidden states, and logits under which each token picks different experts uniformly.

    Every token has the same logits in another random order: evenly spread bfloat16 numbers from 1 up. So nobody's
    rounding or way with ties changes which experts are picked.
    """
    g = torch.Generator(device).manual_seed(1_000_003 * seed + tokens)
    hidden = torch.randn(tokens, shape.hidden, generator=g, dtype=torch.float32, device=device).bfloat16()
    step = max(1, 256 // shape.experts)  # in units of bfloat16's last place
    levels = (torch.arange(shape.experts, dtype=torch.int16, device=device) * step + 0x3F80).view(torch.bfloat16)
    order = torch.rand(tokens, shape.experts, generator=g, dtype=torch.float32, device=device).argsort(-1)
    logits = levels.float()[order]
    active = int(logits.topk(shape.top_k, dim=-1).indices.flatten().bincount().count_nonzero())
    return CallInputs(hidden_states=hidden, logits=logits, active_experts=active)
