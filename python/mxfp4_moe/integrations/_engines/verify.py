"""The check at start-up that MXFP4_MOE_VERIFY=1 asks for: one layer as the engine runs it, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._call.fused_moe import fused_moe
from ...engines import local_ids
from ...routing import fused_moe_from_logits, topk_softmax
from ...weights import MoEWeights
from .register import say
from .table import Engine

_TOKENS = 17
_TOLERANCE = 5e-3  # exp's last bits, after MXFP8's three: as the GPU tests have it


def verify_layer(
    engine: Engine,
    run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    weights: MoEWeights,
    name: str,
    *,
    dtype: torch.dtype,
    top_k: int,
    device: torch.device,
    expert_map: Tensor | None = None,
    keywords: dict[str, Any] | None = None,
) -> None:
    """Compares a layer in an engine with `fused_moe` on weights that came another way, and with the reference.

    Args:
        run: the engine's way: hidden states [T, H], top-k weights and ids [T, k], router logits [T, E] -> [T, H].
        weights: the same layer's, prepared from the checkpoint's tensors without the engine's integration.
        name: the layer's, for the message.
        dtype: of the hidden states.
        expert_map: where the experts here are not consecutive.
        keywords: what `fused_moe` takes beside tensors.

    Raises:
        RuntimeError: other bits, or too far from the reference. The user asked to know.
    """
    more = keywords or {}
    generator = torch.Generator().manual_seed(0)

    def normal(columns: int) -> Tensor:  # made on the CPU, so that every device gets the same
        values = torch.randn(_TOKENS, columns, generator=generator, dtype=torch.float32, device="cpu")
        return values.to(dtype).to(device)

    hidden, logits = normal(weights.hidden_size), normal(weights.num_global_experts)
    topk_weights, topk_ids = topk_softmax(logits, top_k)
    got = run(hidden, topk_weights, topk_ids, logits)
    if expert_map is not None:
        expected = fused_moe(hidden, topk_weights, local_ids(topk_ids, expert_map), weights, **more)
    else:
        expected = fused_moe_from_logits(hidden, logits, top_k, weights, **more)
    if not torch.equal(got.view(torch.uint8), expected.view(torch.uint8)):
        different = int((got != expected).any(1).sum())
        raise RuntimeError(
            f"{name}: {different} of {_TOKENS} tokens have other bits in {engine.title} than from fused_moe; "
            "MXFP4_MOE_ENGINES=off runs the engine's own kernels; open an issue with this line"
        )
    ids = topk_ids if expert_map is None else local_ids(topk_ids, expert_map)
    exact = reference.fused_moe(hidden, topk_weights, ids, weights, **more).double()
    error = float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"{name}: expected a layer within {_TOLERANCE} of the reference, got {error:.2e}; run `mxfp4-moe doctor "
            "--selftest`"
        )
    say(engine, f"mxfp4-moe verified {name} in {engine.title}: the bits of fused_moe, {error:.1e} from the reference")
