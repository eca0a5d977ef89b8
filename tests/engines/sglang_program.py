"""One rank of a gpt-oss layer in SGLang: sglang_program.py MODEL OUT LAYER [--ep] [--backend NAME]

Under torchrun for more ranks.

SGLang resolves its arguments, builds its own block of gpt-oss, loads it, routes, dispatches and runs it; what is ours
must be there because SGLang chose it. What each rank saw goes to OUT/rank<R>.pt.
"""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path
from typing import Any

import sglang_stubs
import torch

sglang_stubs.install()

from safetensors import safe_open  # noqa: E402
from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.distributed import (  # noqa: E402
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
    tensor_model_parallel_all_reduce,
)
from sglang.srt.layers.moe.utils import get_moe_runner_backend, initialize_moe_config  # noqa: E402
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config  # noqa: E402
from sglang.srt.models import gpt_oss  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from transformers import AutoConfig  # noqa: E402

TOKENS = 33


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("layer", type=int)
    parser.add_argument("--ep", action="store_true")
    parser.add_argument("--backend", default="auto", help="--moe-runner-backend")
    given = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    from mxfp4_moe.integrations.sglang import register  # as load_plugins calls it

    register()
    HookRegistry.apply_hooks()
    arguments = ServerArgs(
        model_path=str(given.model),
        device="cpu",
        tp_size=ranks,
        ep_size=ranks if given.ep else 1,
        moe_runner_backend=given.backend,
        disable_cuda_graph=True,
        skip_tokenizer_init=True,
    )
    placement = getattr(runtime_context, "SpawnRanks", None)  # SGLang 0.5.20
    ranked = {} if placement is None else {"ranks": placement(world_rank=rank)}
    runtime_context.publish(arguments, role="test", **ranked)
    initialize_moe_config(*[arguments][: len(inspect.signature(initialize_moe_config).parameters)])
    init_distributed_environment(
        backend="gloo",
        world_size=ranks,
        rank=rank,
        local_rank=rank,
        distributed_init_method=f"tcp://127.0.0.1:{os.environ.get('MASTER_PORT', '29677')}" if ranks == 1 else "env://",
    )
    sizes = {"tensor_model_parallel_size": ranks, "expert_model_parallel_size": ranks if given.ep else 1}
    known = inspect.signature(initialize_model_parallel).parameters  # SGLang 0.5.19 reads the sizes from the arguments
    initialize_model_parallel(backend="gloo", **{name: size for name, size in sizes.items() if name in known})
    config = AutoConfig.from_pretrained(given.model)
    torch.set_default_dtype(torch.bfloat16)
    block: Any = gpt_oss.GptOssSparseMoeBlock(
        given.layer, config, Mxfp4Config(is_checkpoint_mxfp4_serialized=True), prefix=f"model.layers.{given.layer}.mlp"
    )
    load(block, config, given.model, given.layer)
    block.experts.quant_method.process_weights_after_loading(block.experts)

    x = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits, _ = block.router(x)
        topk = block.topk(x, logits)
        ids = block.experts.dispatcher.dispatch(x, topk).topk_output.topk_ids
        part = block.experts.quant_method.apply(block.experts, block.experts.dispatcher.dispatch(x, topk)).hidden_states
        whole = block(x)
        if ranks > 1 and torch.equal(whole, part):  # SGLang 0.5.23 sums behind the block
            whole = tensor_model_parallel_all_reduce(whole.clone())
    seen = {
        "backend": get_moe_runner_backend().value,
        "method": type(block.experts.quant_method).__module__,
        "shapes": {name: list(parameter.shape) for name, parameter in block.experts.named_parameters()},
        "x": x,
        "topk_ids": topk.topk_ids,
        "topk_weights": topk.topk_weights,
        "local_ids": ids,
        "part": part,
        "whole": whole,
    }
    torch.save(seen, given.out / f"rank{rank}.pt")
    torch.distributed.barrier()
    destroy_model_parallel()
    destroy_distributed_environment()  # its threads must not outlive the interpreter


def load(block: Any, config: Any, folder: Path, layer: int) -> None:
    """The layer's tensors, by SGLang's own loader of MXFP4 experts."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if f"layers.{layer}.mlp" in name}  # noqa: SIM118
    model = torch.nn.Module()
    model.config = config
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(layer + 1)])
    model.model.layers[layer].mlp = block
    experts = [(name, tensor) for name, tensor in sorted(tensors.items()) if ".experts." in name]
    loaded = gpt_oss.GptOssForCausalLM._load_mxfp4_experts_weights(model, experts)
    assert len(loaded) == len(experts) == 6
    prefix = f"model.layers.{layer}.mlp.router."
    block.router.weight.data.copy_(tensors[f"{prefix}weight"])
    block.router.bias.data.copy_(tensors[f"{prefix}bias"])


if __name__ == "__main__":
    main()
