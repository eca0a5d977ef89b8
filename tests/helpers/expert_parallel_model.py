"""One rank of an expert-parallel gpt-oss: expert_parallel_model.py MODEL SAVED, where rank<R>.json goes too."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from mxfp4_moe.integrations.transformers import enable


def main(folder: str, saved: str) -> None:
    """Compares a layer of the sharded model with the whole one, and saves."""
    assert enable(activation_format="mxfp8")
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    sizes = [name for name in ("tp_size", "ep_size") if name in DistributedConfig.__dataclass_fields__]
    given: dict[str, Any] = dict.fromkeys(sizes, int(os.environ["WORLD_SIZE"]))
    if "ep_size" not in sizes:  # older versions of transformers
        given["enable_expert_parallel"] = True
    config = DistributedConfig(**given)
    plan: dict[str, Any] = {} if sizes else {"tp_plan": "auto"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config, **plan)

    block, expected = model.model.layers[1].mlp, whole.model.layers[1].mlp
    x = torch.randn(9, whole.config.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()[None]
    with torch.no_grad():
        exact = expected(x)[0].float()
        error = (block(x)[0].float() - exact).norm() / exact.norm()
        alone = local_part(block.experts, expected, x).float()
    local = block.experts.w13
    line = {
        "rank": dist.get_rank(),
        "experts": type(block.experts).__name__,
        "bytes": getattr(local, "_local_tensor", local).nbytes,
        "whole_bytes": expected.experts.w13.nbytes,
        "error": float(error),
        "alone": float((alone - exact).norm() / exact.norm()),
    }
    if sizes:  # transformers 5.12 cannot save an expert-parallel model, ours or its own
        model.save_pretrained(saved)
    Path(saved, f"rank{dist.get_rank()}.json").write_text(json.dumps(line))
    dist.barrier()
    dist.destroy_process_group()


def local_part(experts: Any, whole: Any, x: torch.Tensor) -> torch.Tensor:
    """What this rank's experts give, without the other's."""
    rows = x.reshape(-1, x.shape[-1])
    _, scores, ids = whole.router(rows)
    begin = dist.get_rank() * experts.num_experts
    here = (ids >= begin) & (ids < begin + experts.num_experts)
    part: torch.Tensor = whole.experts(rows, ids, torch.where(here, scores, 0))
    return part.view(x.shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
