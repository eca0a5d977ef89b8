"""One new process for `host.fresh_process`: times the import and the first call, and prints them as JSON.

`python -m mxfp4_moe.bench.fresh` imports the parent package before this file runs, so the import is timed in a child
of this process, and everything else here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

_IMPORT = (
    "import torch, time; start = time.perf_counter(); from mxfp4_moe import MoEWeights, fused_moe, topk_softmax; "
    "print((time.perf_counter() - start) * 1e3)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("device", "tokens", "experts", "top-k", "hidden", "intermediate"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    imported = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)

    import torch

    from mxfp4_moe import MoEWeights, fused_moe_from_logits
    from mxfp4_moe.formats import weight_bytes, word_order_of

    device = torch.device("cuda", given.device)
    e, h, i = given.experts, given.hidden, given.intermediate

    def words(*sizes: int) -> torch.Tensor:
        return torch.full(sizes, 0x11, dtype=torch.uint8, device=device)

    weights = MoEWeights(  # any bits will do, so nothing has to be prepared
        w13=words(e, weight_bytes(2 * i, h)),
        w2=words(e, weight_bytes(h, i)),
        hidden_size=h,
        intermediate_size=i,
        word_order=word_order_of(device),
    )
    hidden = torch.randn(given.tokens, h, dtype=torch.float32, device=device).bfloat16()
    logits = torch.randn(given.tokens, e, dtype=torch.float32, device=device)

    def call_ms() -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        fused_moe_from_logits(hidden, logits, given.top_k, weights)
        torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    first, second = call_ms(), call_ms()
    print(json.dumps({"import_ms": float(imported.stdout), "first_call_ms": first, "second_call_ms": second}))


if __name__ == "__main__":
    main()
