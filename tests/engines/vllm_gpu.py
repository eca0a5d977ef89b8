"""vLLM on GPUs with our kernels and CUDA graphs, alone and over two ranks: a program, for a machine without pytest.

    python tests/engines/vllm_gpu.py [--cases one,tp,ep,own] [--activations mxfp8] [--model FOLDER] [--keywords JSON]
                                     [--out FILE.json]

Cases are one GPU, two tensor- and two expert-parallel ones, and vLLM's own kernels. For each of ours: our layer ran in
every rank; the first layer's first call has the bits of `fused_moe` on the checkpoint's own bytes, on a GPU of the same
kind; with two ranks their outputs add up to the whole layer's within the bfloat16 rounding of each; and the prompts'
tokens are as likely as with one rank, and as with vLLM's own kernels, within what differs. Exit status 1 where one of
these does not hold. --out keeps how likely they were; what is in there already is compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from printed_checks import Checks
from vllm_checks import computed_again, first_call, start

from mxfp4_moe.bench.engine.random_model import Sizes, write_gpt_oss

CASES = ("one", "tp", "ep", "own")
TWO = {"tensor_parallel_size": 2}
KEYWORDS: dict[str, dict[str, Any]] = {"one": {}, "tp": TWO, "ep": {**TWO, "enable_expert_parallel": True}}
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
# Each rank rounds its sum to bfloat16, half of 2^-8 at most; 5e-3 is what the GPU tests allow a layer.
SUM_TOLERANCE = 5e-3
# Mean |d log p| of a prompt's token, in a random model, which amplifies: twice what MXFP8 activations did on the CPU.
SAME_MEAN, OWN_MEAN = 0.25, 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="one,own", help=f"of {','.join(CASES)}, with commas")
    parser.add_argument("--activations", default="mxfp8", help="MXFP4_MOE_ACTIVATIONS: engine, bf16, fp16 or mxfp8")
    parser.add_argument("--model", type=Path, help="a gpt-oss in MXFP4; without one, two layers of gpt-oss-20b's size")
    parser.add_argument("--keywords", default="{}", help="JSON for vLLM's LLM, such as an attention backend")
    parser.add_argument("--out", type=Path, help="JSON: how likely each case had the prompts' tokens")
    arguments = parser.parse_args()
    common = {"gpu_memory_utilization": 0.4, **GRAPHS, **json.loads(arguments.keywords)}
    ours = {"MXFP4_MOE_ACTIVATIONS": arguments.activations, "MXFP4_MOE_VERIFY": "1"}
    half = {"dtype": "float16"} if arguments.activations == "fp16" else {}  # which vLLM's own kernels refuse
    cases = arguments.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: expected some of {','.join(CASES)}, got {','.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or write_gpt_oss(Path(folder) / "model", Sizes(layers=2))
        checks = Checks()
        likely: dict[str, torch.Tensor] = {}
        if arguments.out and arguments.out.exists():
            before = json.loads(arguments.out.read_text(encoding="utf-8"))
            likely = {name: torch.tensor(values) for name, values in before.items()}
        for name in (name for name in ("one", "tp", "ep") if name in cases):
            keywords, split = KEYWORDS[name], "ep" if name == "ep" else "tp"
            out = Path(folder) / f"{name}.json"
            data, said = start(model, out, {**common, **half, **keywords}, **ours)
            ranks = keywords.get("tensor_parallel_size", 1)
            lines = [line[line.index("mxfp4-moe") :] for line in said.splitlines() if "mxfp4-moe" in line]
            print(f"{name}:", *dict.fromkeys(lines), sep="\n    ")
            checks(name, "all ranks verified", said.count("the bits of fused_moe") == ranks)
            checks(name, "our layer was called", all(worker["calls"] > 0 for worker in data["workers"]))
            kept = [first_call(out, rank) for rank in range(ranks)]
            for rank, call in enumerate(kept):
                again = computed_again(model, call, rank, ranks, split, "cuda")
                checks(name, f"rank {rank}'s first call has fused_moe's bits", torch.equal(again, call["output"]))
            likely[name] = torch.tensor([p for text in data["given"] for p in text])
            if arguments.out:
                values = {case: values.tolist() for case, values in likely.items()}
                arguments.out.write_text(json.dumps(values), encoding="utf-8")
            if ranks > 1:
                whole = computed_again(model, kept[0], 0, 1, "tp", "cuda").double()  # rank 0 has the whole layer's ids
                total = torch.stack([call["output"].double() for call in kept]).sum(0)
                error = float((total - whole).norm() / whole.norm())
                checks(name, f"ranks add up to the layer: {error:.1e} <= {SUM_TOLERANCE}", error <= SUM_TOLERANCE)
                if "one" in likely:
                    checks.mean(name, "prompts, with one rank", likely[name], likely["one"], SAME_MEAN)
        if "own" not in cases:
            return checks.status
        data, said = start(model, Path(folder) / "own.json", common, MXFP4_MOE_ENGINES="off")
        own = torch.tensor([p for text in data["given"] for p in text])
        checks("own", "vLLM's own kernels ran", "mxfp4_moe" not in str(data["workers"][0]["methods"]))
        for name, ours_are in likely.items():
            checks.mean(name, f"prompts, with vLLM's own {data['workers'][0]['experts'][0]}", ours_are, own, OWN_MEAN)
    return checks.status


if __name__ == "__main__":
    sys.exit(main())
