"""Lets vLLM's EPLB exchange experts between ranks, as a program: vllm_eplb.py MODEL OUT.json '{...}'

vLLM switches EPLB on for GPUs alone. What it then does to a layer is done here: the layer's own list of what belongs to
an expert, vLLM's plan and transfer, and its experts called with the new places.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

TOKENS = 24


def exchange(model: Any) -> dict[str, Any]:
    """In a worker: each expert's outputs before and after all have moved, in every layer otherwise."""
    import torch
    from vllm.distributed import get_ep_group
    from vllm.distributed.eplb.eplb_communicator import create_eplb_communicator
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    group = get_ep_group()
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    weights = [list(layer.get_expert_weights()) for layer in layers]
    buffer = [torch.empty_like(tensor) for tensor in weights[0]]
    experts, generator = layers[0].global_num_experts, torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, layers[0].hidden_size, generator=generator, dtype=torch.float32)
    hidden = hidden.to(layers[0].moe_config.in_dtype)
    chosen = torch.arange(TOKENS) % experts  # a token goes to one expert, so the sum over ranks rounds nothing

    def outputs(places: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's, where expert places[p] of the model is at place p."""
        found = []
        for layer, row in zip(layers, places, strict=True):
            ids = torch.argsort(row)[chosen].to(torch.int32)[:, None]
            part = layer.forward_modular(hidden.clone(), torch.ones(TOKENS, 1, dtype=torch.float32), ids)
            total = part.float()
            torch.distributed.all_reduce(total, group=group.cpu_group)
            found.append(total)
        return found

    old = torch.arange(experts).repeat(len(layers), 1)
    new = torch.stack([torch.randperm(experts, generator=generator) for _ in layers])
    before = outputs(old)
    communicator = create_eplb_communicator(group, "torch_nccl", weights, buffer)  # on a CPU: over gloo
    rearrange_expert_weights_inplace(old, new, weights, buffer, group.cpu_group, communicator)
    after, astray = outputs(new), outputs(old)
    here = experts // group.world_size
    return {
        "methods": [type(layer.quant_method).__module__ for layer in layers],
        "kinds": [len({tuple(row) for row in factors}) for layer in layers for factors in factors_of(layer)],
        "factors": [factors_of(layer, anew=True) == factors_of(layer) for layer in layers],
        "moves": int((torch.argsort(new, 1) // here != old // here).sum()),
        "nonzero": all(bool((row != 0).any(1).all()) for row in before),
        "same": [torch.equal(a, b) for a, b in zip(before, after, strict=True)],
        "same_astray": [torch.equal(a, b) for a, b in zip(before, astray, strict=True)],
    }


def factors_of(layer: Any, anew: bool = False) -> list[Any]:
    """What a GPU's kernel is given with float16 activations (a CPU finds them by itself); or made of the bytes now."""
    weights = layer.quant_method.moe_kernel.fused_experts.weights
    if layer.quant_method.decision.activation_format != "fp16":
        return []
    return [factors.tolist() for factors in (replace(weights) if anew else weights).fp16_factors()]


def main() -> None:
    import vllm_eplb as workers  # by the name under which they find its functions
    from vllm import LLM

    model, out, keywords = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    engine = LLM(model, skip_tokenizer_init=True, max_model_len=256, seed=0, **{"dtype": "bfloat16", **keywords})
    Path(out).write_text(json.dumps(engine.apply_model(workers.exchange)), encoding="utf-8")


if __name__ == "__main__":
    main()
