"""Generates with vLLM and says what happened, as JSON: a program of its own, because vLLM starts processes.

    vllm_program.py MODEL OUT.json '{"tensor_parallel_size": 2, ...}'

In every worker, the calls of the layer are counted, and the first one is kept with its inputs and output: so a test
knows that our layer ran, and can compute it again from the checkpoint's own bytes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for apply_model
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS = [[(7 * i + 3 * j) % 500 + 3 for i in range(n)] for j, n in enumerate((5, 17, 40, 130))]
TOKENS = 8


def watch(out: str, model: Any) -> str:
    """In a worker: counts the reference's calls, which every CPU call of ours ends in, and keeps the first."""
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank

    from mxfp4_moe import reference

    rank, seen = get_tensor_model_parallel_rank(), {"calls": 0}
    compute = reference.fused_moe

    def counted(*arguments: Any, **keywords: Any) -> Any:
        result = compute(*arguments, **keywords)
        seen["calls"] += 1
        if seen["calls"] == 1:
            hidden, topk_weights, topk_ids, weights = arguments
            ids = topk_ids - weights.first_expert
            kept = {"hidden": hidden, "topk_weights": topk_weights, "local_ids": ids, "output": result}
            torch.save({name: tensor.clone() for name, tensor in kept.items()}, f"{out}.rank{rank}.pt")
        return result

    reference.fused_moe = counted
    reference.seen = seen  # type: ignore[attr-defined]
    return f"rank {rank}"


def tell(model: Any) -> dict[str, Any]:
    """In a worker: what `watch` has seen, and whose methods the experts have."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from mxfp4_moe import reference

    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    kernels = [getattr(layer.quant_method, "moe_kernel", None) for layer in experts]
    return {
        "calls": getattr(reference, "seen", {"calls": 0})["calls"],
        "methods": [type(layer.quant_method).__module__ for layer in experts],
        "experts": [type(kernel.fused_experts).__name__ for kernel in kernels if kernel is not None],
        "parameters": {name: list(p.shape) for name, p in experts[0].named_parameters()},
    }


def main() -> None:
    import vllm_program as workers  # by the name under which they find its functions
    from vllm import LLM, SamplingParams

    model, out, keywords = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    engine = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        dtype="bfloat16",
        seed=0,
        **keywords,
    )
    engine.apply_model(functools.partial(workers.watch, out))
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=1, detokenize=False, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    texts = [
        {
            "prompt": prompt,
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(answer.outputs[0].logprobs, answer.outputs[0].token_ids, strict=True)
            ],
        }
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    Path(out).write_text(json.dumps({"texts": texts, "workers": engine.apply_model(workers.tell)}), encoding="utf-8")


if __name__ == "__main__":
    main()
