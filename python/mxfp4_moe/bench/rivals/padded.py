"""The layer's weights as rivals of FlashInfer's kind want them: [up; gate] rows, sizes padded with zeros.

Zero rows and columns change no output: an activation of zeros is zero for every SwiGLU, with biases of zero. The time
of a padded layer is held against the unpadded layer's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ...weights import MoEWeights
    from ..inputs import LayerTensors

_SCALE = 118  # any value of the real scales' range: the weights under it are zero


@dataclass(frozen=True, kw_only=True)
class PaddedLayer:
    """Of H x I padded to a multiple; names and layouts as `LayerTensors`, but for the rows' order."""

    hidden: int
    intermediate: int
    w13: Tensor  # uint8 [E, 2I, H/2], rows [up; gate]
    w13_scale: Tensor  # uint8 [E, 2I, H/32]
    w2: Tensor  # uint8 [E, H, I/2]
    w2_scale: Tensor  # uint8 [E, H, I/32]
    w13_bias: Tensor  # bfloat16 [E, 2I]
    w2_bias: Tensor  # bfloat16 [E, H]

    def pad_rows(self, hidden_states: Tensor) -> Tensor:
        """[T, H] with zeros up to the padded H."""
        import torch

        return torch.nn.functional.pad(hidden_states, (0, self.hidden - hidden_states.shape[1]))


def up_gate(tensors: LayerTensors, multiple: int) -> PaddedLayer:
    """Pads both sizes to multiples of `multiple`, itself one of 32."""
    import torch
    from torch.nn.functional import pad

    shape = tensors.shape
    hidden, inter = (-(-size // multiple) * multiple for size in (shape.hidden, shape.intermediate))
    more_hidden, more_inter = hidden - shape.hidden, inter - shape.intermediate

    def halves(rows: Tensor, columns: int, value: int = 0) -> Tensor:
        up, gate = (pad(rows[:, i::2], (0, columns, 0, more_inter), value=value) for i in (1, 0))
        return torch.cat((up, gate), 1)

    return PaddedLayer(
        hidden=hidden,
        intermediate=inter,
        w13=halves(tensors.w13, more_hidden // 2),
        w13_scale=halves(tensors.w13_scale, more_hidden // 32, _SCALE),
        w2=pad(tensors.w2, (0, more_inter // 2, 0, more_hidden)),
        w2_scale=pad(tensors.w2_scale, (0, more_inter // 32, 0, more_hidden), value=_SCALE),
        w13_bias=halves(tensors.w13_bias[..., None], 0)[..., 0],
        w2_bias=pad(tensors.w2_bias, (0, more_hidden)),
    )


def swizzled(scales: Tensor) -> Tensor:
    """uint8 [E, N, K/32] in the 128x4 layout, viewed as int32 [E, N padded to 128, K/128]."""
    import torch

    from ...formats import swizzle_scales

    experts, rows, blocks = scales.shape
    padded = swizzle_scales(scales).reshape(experts, -(-rows // 128) * 128, -(-blocks // 4) * 4)
    return padded.view(torch.int32)


def plain_swiglu(tensors: LayerTensors, limit: float | None = None) -> MoEWeights:
    """Our weights of the layer that rivals compute which have neither biases nor gpt-oss's SwiGLU."""
    from ...weights import MoEWeights

    return MoEWeights.from_mxfp4(
        tensors.w13,
        tensors.w13_scale,
        tensors.w2,
        tensors.w2_scale,
        activation="swiglu" if limit is None else "swiglu_oai",
        alpha=1.0,
        beta=0.0,
        limit=limit,
    )
