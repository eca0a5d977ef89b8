"""One run: vLLM in this process, timed; what it found goes to a file. A program, started anew for each run.

python -m mxfp4_moe.bench.engine.serve '{"model": ..., "out": ..., "keywords": {...}, "load": {...}}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    task = json.loads(sys.argv[1])
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    begin = time.perf_counter()
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    load = task["load"]
    most = max(load["decode"])
    keywords = {
        "skip_tokenizer_init": True,
        "max_model_len": load["prompt"] + load["long"] + 16,
        "max_num_seqs": most,
        "max_num_batched_tokens": max(4096, load["prompt"]),
        "dtype": "bfloat16",
        "seed": 0,
        "enable_prefix_caching": False,
        **task["keywords"],
    }
    engine = LLM(task["model"], **keywords)
    started = time.perf_counter() - begin
    words = int(engine.llm_engine.model_config.get_vocab_size())

    def seconds(sequences: int, prompt: int, answer: int) -> float:
        """Of a batch of different prompts."""
        prompts: list[Any] = [
            {"prompt_token_ids": [(7 * i + 3 * j + sequences) % (words - 8) + 3 for i in range(prompt)]}
            for j in range(sequences)
        ]
        sampling = SamplingParams(max_tokens=answer, temperature=0.0, detokenize=False, ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    first = seconds(1, load["prompt"], 1)
    second = seconds(1, load["prompt"], 1)
    decode, prefill = [], []
    for sequences in load["decode"]:
        seconds(sequences, 16, load["long"])
        steps = []
        for _ in range(load["repeats"]):  # a short and a long one beside each other, so that both see the same host
            short, long = (seconds(sequences, 16, answer) for answer in (load["short"], load["long"]))
            steps.append((long - short) / (load["long"] - load["short"]) * 1e3)
        decode.append({"sequences": sequences, "ms_per_step": steps})
    for prompts in load["prefill"]:
        seconds(prompts, load["prompt"], 1)
        times = [seconds(prompts, load["prompt"], 1) * 1e3 for _ in range(load["repeats"])]
        prefill.append({"prompts": prompts, "tokens": load["prompt"], "ms": times})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "vllm": str(vllm.__version__),
        "torch": str(torch.__version__),
        "device": device,
        "start_s": started,
        "first_token_ms": first * 1e3,
        "second_token_ms": second * 1e3,
        "decode": decode,
        "prefill": prefill,
    }
    Path(task["out"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
