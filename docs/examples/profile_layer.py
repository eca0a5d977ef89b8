r"""One call of a gpt-oss-120b layer for a profiler, its kernels between cudaProfilerStart and cudaProfilerStop:

    ncu --profile-from-start off --clock-control none -k regex:grouped_gemm \
        python docs/examples/profile_layer.py --tokens 64

Weights and tokens are random, the L2 cache is overwritten before the call.
"""

from __future__ import annotations

import argparse

import torch

import mxfp4_moe
from mxfp4_moe.problems import random_weights

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 4, 2880, 2880
FLUSH_BYTES = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--tile", help="M,N; the package's choice by default")
    arguments = parser.parse_args()
    tile_mn = tuple(map(int, arguments.tile.split(","))) if arguments.tile else None

    device = torch.device("cuda")
    weights = random_weights(EXPERTS, HIDDEN, INTERMEDIATE, device)
    hidden_states = torch.randn(arguments.tokens, HIDDEN, dtype=torch.bfloat16, device=device)
    logits = torch.randn(arguments.tokens, EXPERTS, device=device)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def call() -> None:
        mxfp4_moe.fused_moe_from_logits(hidden_states, logits, TOP_K, weights, tile_mn=tile_mn)
        torch.cuda.synchronize()

    call()  # loads the tile
    flush.zero_()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
