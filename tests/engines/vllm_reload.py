"""Lets vLLM load other weights into a model that runs, as a program: vllm_reload.py MODEL OUT.json '{"other": ...}'

As reinforcement learning does between steps. What a CUDA graph has captured are addresses: so the weights that a call
had before are called again after, without anything of ours in between.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

TOKENS = 24
_kept: dict[str, Any] = {}


def call(folder: str, model: Any) -> dict[str, Any]:
    """In a worker: whether layer 0 computes what `fused_moe` does with a folder's weights; at the old addresses too."""
    import torch
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from mxfp4_moe import MoEWeights, fused_moe, topk_softmax

    layer = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    experts = layer.quant_method.moe_kernel.fused_experts
    g = torch.Generator().manual_seed(3)
    device = layer.w13_weight.device

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(TOKENS, columns, generator=g, dtype=torch.float32, device="cpu").to(device)

    hidden = normal(layer.hidden_size).to(layer.moe_config.in_dtype)
    logits = normal(layer.global_num_experts)
    chosen = topk_softmax(logits, layer.moe_config.experts_per_token)
    read = MoEWeights.from_safetensors(folder, layer=0).to(device, layer.quant_method.decision.activation_format)
    expected = fused_moe(hidden, *chosen, read, **experts.keywords)
    now = layer.quant_method.apply_monolithic(layer, hidden.clone(), logits)
    before = _kept.setdefault("weights", experts.weights)
    places = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    stayed = places == _kept.setdefault("places", places)
    captured = fused_moe(hidden, *chosen, before, **experts.keywords)
    return {
        "now": torch.equal(now, expected),
        "captured": torch.equal(captured, expected),
        "stayed": stayed,
        "factors": factors(before) == factors(read),
        "sum": float(expected.double().abs().sum()),
        "parameters": sorted(places),
    }


def factors(weights: Any) -> list[Any]:
    """What a GPU's kernel is given with float16 activations; a CPU finds them by itself, so outputs do not tell."""
    return [found.tolist() for found in weights.fp16_factors()] if weights._fp16 is not None else []


def write_part(folder: str, model: Any) -> bool:
    """In a worker: writes another layer's prepared weights and biases by their names, and no factors."""
    import torch
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from mxfp4_moe import MoEWeights

    layer = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    wanted = layer.quant_method.decision.activation_format
    read = MoEWeights.from_safetensors(folder, layer=0).to(layer.w13_weight.device, wanted)
    with torch.no_grad():
        for name in ("w13", "w2"):
            getattr(layer, f"{name}_weight").copy_(getattr(read, name))
            getattr(layer, f"{name}_bias").copy_(getattr(read, f"{name}_bias"))
    return True


def main() -> None:
    import vllm_reload as workers  # by the name under which they find its functions
    from vllm import LLM

    model, out, given = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    other = given.pop("other")
    engine = LLM(model, skip_tokenizer_init=True, max_model_len=256, seed=0, **{"dtype": "bfloat16", **given})
    found = [engine.apply_model(functools.partial(workers.call, model))]
    for folder in (other, model):
        engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        found.append(engine.apply_model(functools.partial(workers.call, folder)))
    engine.apply_model(functools.partial(workers.write_part, other))
    found.append(engine.apply_model(functools.partial(workers.call, other)))
    Path(out).write_text(json.dumps([seen for (seen,) in found]), encoding="utf-8")


if __name__ == "__main__":
    main()
