r"""What a shared expert costs: joined to the routed ones, and as a layer of its own whose output is added.

    python docs/examples/shared_experts.py --experts 128 --top-k 4 --hidden 6144 --intermediate 3072

prints, for each number of tokens, microseconds of the routed layer alone, of the joined one, and of both layers one
after the other: CUDA graphs replayed behind an emptied L2 cache, medians. The sizes above are MiniMax-M3's. The results
of both ways are compared before they are timed.
"""

from __future__ import annotations

import argparse

import torch

from mxfp4_moe import fused_moe, join_shared_experts
from mxfp4_moe.bench.timing import Timer
from mxfp4_moe.problems import random_call, random_weights, relative_error

TOLERANCE = 1e-2  # two sums are rounded to bfloat16 instead of one
CALLS = 3  # with other tokens, in turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 128), ("top-k", 4), ("hidden", 6144), ("intermediate", 3072), ("replays", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    given = parser.parse_args()

    device = torch.device("cuda")
    options = {"bias": False, "activation": "swiglu"}
    routed = random_weights(given.experts, given.hidden, given.intermediate, device, **options)
    shared = random_weights(1, given.hidden, given.intermediate, device, seed=1, **options)
    joined = join_shared_experts(routed, shared)
    timer = Timer(device)
    print(f"{torch.cuda.get_device_name(device)}; {vars(given)}")
    print(f"{'tokens':>7} {'routed us':>10} {'joined us':>10} {'apart us':>10} {'joined / apart':>15}")
    for tokens in given.tokens:
        calls = [random_call(tokens, given.top_k, routed, seed=seed).args() for seed in range(CALLS)]
        one, zero = torch.ones(tokens, 1, device=device), torch.zeros(tokens, 1, dtype=torch.int32, device=device)

        def together(call: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return fused_moe(call[0], *joined.choices(*call[1:]), joined.weights)

        def apart(
            call: tuple[torch.Tensor, torch.Tensor, torch.Tensor], one: torch.Tensor = one, zero: torch.Tensor = zero
        ) -> torch.Tensor:
            return fused_moe(*call, routed).add_(fused_moe(call[0], one, zero, shared))

        error = relative_error(together(calls[0]), apart(calls[0]))
        if not error <= TOLERANCE:
            raise SystemExit(f"{tokens} tokens: the two ways differ by {error:.3g} of the norm")
        ways = (lambda call: fused_moe(*call, routed), together, apart)
        times = [
            timer.measure([lambda way=way, call=call: way(call) for call in calls], given.replays).median
            for way in ways
        ]
        print(f"{tokens:>7} {times[0]:>10.1f} {times[1]:>10.1f} {times[2]:>10.1f} {times[1] / times[2]:>15.3f}")


if __name__ == "__main__":
    main()
