"""Generates with vLLM and says what happened, as JSON: a program of its own, because vLLM starts processes.

    vllm_program.py MODEL OUT.json '{"tensor_parallel_size": 2, ...}'

In every worker, the calls of our layer are counted, and the first one is kept with its inputs and output: so a test
knows that our layer ran, and can compute it again from the checkpoint's own bytes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = [[(7 * i + 3 * j) % 500 + 3 for i in range(n)] for j, n in enumerate((5, 17, 40, 130))]
TOKENS = 8
_seen: dict[str, Any] = {"calls": 0}


def watch(out: str, model: Any) -> None:
    """In a worker: counts our layers' calls, and keeps the first, which is the first layer's in a prefill.

    On the CPU every call ends in the reference, also one from a compiled graph. On a GPU the experts' own calls are
    seen: all but those that CUDA graphs replay.
    """
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank

    import mxfp4_moe
    from mxfp4_moe import engines, reference

    rank = get_tensor_model_parallel_rank()

    def keep(hidden: Any, topk_weights: Any, local_ids: Any, output: Any, keywords: dict[str, Any]) -> None:
        _seen["calls"] += 1
        if _seen["calls"] == 1:
            tensors = {"hidden": hidden, "topk_weights": topk_weights, "local_ids": local_ids, "output": output}
            kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            torch.save({**kept, "keywords": keywords}, f"{out}.rank{rank}.pt")

    if not torch.cuda.is_available():
        compute = reference.fused_moe

        def counted(*arguments: Any, **keywords: Any) -> Any:
            result = compute(*arguments, **keywords)
            hidden, topk_weights, topk_ids, weights = arguments
            given = {"activation_format": keywords["activation_format"]}
            keep(hidden, topk_weights, topk_ids - weights.first_expert, result, given)
            return result

        reference.fused_moe = counted
        return

    def watched(experts: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
        def run(**given: Any) -> Any:
            hidden, result = given["hidden_states"].clone(), apply(**given)
            if experts.is_monolithic():
                top_k = experts.moe_config.experts_per_token
                topk_weights, ids = mxfp4_moe.topk_softmax(given["router_logits"].contiguous(), top_k)
                local, output = ids - experts.weights.first_expert, result
            else:
                topk_weights, ids, output = given["topk_weights"].float(), given["topk_ids"], given["output"]
                shifted = experts.shifted
                local = ids - experts.weights.first_expert if shifted else engines.local_ids(ids, given["expert_map"])
            if not torch.cuda.is_current_stream_capturing():
                keep(hidden, topk_weights, local, output, experts.keywords)
            return result

        return run

    for experts in our_experts(model):
        experts.apply = watched(experts, experts.apply)


def our_experts(model: Any) -> list[Any]:
    """The kernels of all layers of experts, vLLM's own too."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    return [layer.quant_method.moe_kernel.fused_experts for layer in layers]


def tell(model: Any) -> dict[str, Any]:
    """In a worker: what `watch` has seen, and whose the experts are."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    return {
        "calls": _seen["calls"],
        "methods": [type(layer.quant_method).__module__ for layer in layers],
        "experts": [type(experts).__name__ for experts in our_experts(model)],
        "parameters": {name: list(p.shape) for name, p in layers[0].named_parameters()},
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
        seed=0,
        **{"dtype": "bfloat16", **keywords},
    )
    if os.environ.get("MXFP4_MOE_ENGINES") != "off":
        engine.apply_model(functools.partial(workers.watch, out))
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=1, detokenize=False, ignore_eos=True)
    texts = [
        {
            "prompt": prompt,
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(answer.outputs[0].logprobs, answer.outputs[0].token_ids, strict=True)
            ],
        }
        for prompt, answer in zip(PROMPTS, engine.generate(prompts, sampling, use_tqdm=False), strict=True)
    ]
    # How likely the prompts' own tokens are: the same text for everybody, whatever was chosen above.
    forced = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    given = [
        [step[token].logprob for step, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)]
        for prompt, answer in zip(PROMPTS, engine.generate(prompts, forced, use_tqdm=False), strict=True)
    ]
    workers_say = engine.apply_model(workers.tell)
    Path(out).write_text(json.dumps({"texts": texts, "given": given, "workers": workers_say}), encoding="utf-8")


if __name__ == "__main__":
    main()
