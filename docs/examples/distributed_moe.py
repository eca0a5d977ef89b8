"""One MoE layer over several processes: experts and the intermediate dimension split over the ranks, outputs summed.

    torchrun --nproc-per-node 2 docs/examples/distributed_moe.py --checkpoint gpt-oss-20b/ --device cuda

Ranks are numbered as ep_rank * tp_size + tp_rank. Every rank reads its own part of the layer's weights, computes what
its experts and its shard contribute to all tokens, and one all-reduce adds the ranks up. On the CPU (--device cpu, the
default) the same program runs with gloo.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import mxfp4_moe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="gpt-oss checkpoint, safetensors")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share one expert; the rest is experts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--call", type=Path, help="torch.save of hidden_states, topk_weights, topk_ids; default: random"
    )
    parser.add_argument("--output", type=Path, help="where to torch.save the layer's output")
    args = parser.parse_args()

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=os.environ.get("MXFP4_MOE_RENDEZVOUS", "env://"),
        rank=rank,
        world_size=world,
    )

    weights = mxfp4_moe.MoEWeights.from_safetensors(
        args.checkpoint,
        layer=args.layer,
        ep_rank=rank // args.tp_size,
        ep_size=world // args.tp_size,
        tp_rank=rank % args.tp_size,
        tp_size=args.tp_size,
        device=device,
    )
    # All ranks have all tokens and their router's choice, in global expert ids.
    call = random_call(weights) if args.call is None else torch.load(args.call)
    call = {name: tensor.to(device) for name, tensor in call.items()}
    out = mxfp4_moe.fused_moe(**call, weights=weights)
    dist.all_reduce(out)

    print(f"rank {rank} of {world}: {weights}, output norm {out.float().norm().item():.6g}", flush=True)
    if args.output is not None:
        torch.save(out.cpu(), args.output)
    dist.destroy_process_group()


def random_call(weights: mxfp4_moe.MoEWeights, tokens: int = 16, top_k: int = 4) -> dict[str, torch.Tensor]:
    """The same random tokens on every rank."""
    g = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(tokens, weights.hidden_size, generator=g).bfloat16()
    logits = torch.randn(tokens, weights.num_global_experts, generator=g)
    topk_weights, topk_ids = logits.topk(top_k)
    return {"hidden_states": hidden_states, "topk_weights": topk_weights.softmax(-1), "topk_ids": topk_ids}


if __name__ == "__main__":
    main()
