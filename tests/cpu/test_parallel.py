"""Expert and tensor parallel layers: the sum over the ranks of a process group equals the layer in one process.

docs/examples/distributed_moe.py is the program that runs on every rank; here it runs under gloo on CPUs, and under NCCL
on two GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch

import mxfp4_moe
from mxfp4_moe import MoEWeights, fused_moe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "distributed_moe.py"
E, T, K, H, INTER = 8, 24, 3, 64, 128
# Each rank rounds its rows and its sum to bfloat16, 2^-9 each, and so does the all-reduce; one process rounds once.
TOLERANCE = 1e-2


def call(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=g).bfloat16()
    topk_weights, topk_ids = torch.randn(T, E, generator=g).softmax(-1).topk(K)
    return x, topk_weights, topk_ids


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("activation", ["swiglu_oai", "relu2"])
@pytest.mark.parametrize(("ep_size", "tp_size"), [(1, 1), (2, 1), (8, 1), (1, 2), (1, 4), (2, 2), (4, 4)])
def test_the_ranks_sum_to_the_layer(ep_size: int, tp_size: int, activation: str) -> None:
    checkpoint = oracles.random_checkpoint(E, H, INTER)
    if activation == "relu2":
        checkpoint = {n: t[:, :INTER] if n.startswith("w13") else t for n, t in checkpoint.items()}
    weights = MoEWeights.from_mxfp4(**checkpoint, activation=activation)
    x, topk_weights, topk_ids = call()
    ids_of_nothing = topk_ids.clone()
    ids_of_nothing[0], ids_of_nothing[1, 0] = -1, E
    for ids in (topk_ids, ids_of_nothing, topk_ids.int()):
        whole = fused_moe(x, topk_weights, ids, weights)
        parts = [
            fused_moe(x, topk_weights, ids, weights.expert_parallel(ep, ep_size).tensor_parallel(tp, tp_size))
            for ep in range(ep_size)
            for tp in range(tp_size)
        ]
        assert distance(torch.stack(parts).double().sum(0), whole) < TOLERANCE


def test_a_rank_computes_what_it_owns_and_nothing_else() -> None:
    """The same bits as the whole layer with the other ranks' ids taken out."""
    weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(E, H, INTER))
    x, topk_weights, topk_ids = call()
    for rank in range(4):
        own = (topk_ids >= 2 * rank) & (topk_ids < 2 * rank + 2)
        expected = fused_moe(x, topk_weights, torch.where(own, topk_ids, -1), weights)
        assert torch.equal(fused_moe(x, topk_weights, topk_ids, weights.expert_parallel(rank, 4)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("ep_size", "tp_size"), [(4, 1), (1, 4), (2, 2)])
def test_the_ranks_sum_to_the_layer_on_the_gpu(ep_size: int, tp_size: int) -> None:
    weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(E, H, INTER)).to("cuda")
    args = [tensor.cuda() for tensor in call()]
    compiled = torch.compile(fused_moe, fullgraph=True, backend="eager")
    parts = []
    for ep in range(ep_size):
        for tp in range(tp_size):
            part = weights.expert_parallel(ep, ep_size).tensor_parallel(tp, tp_size)
            parts.append(fused_moe(*args, part))
            assert torch.equal(compiled(*args, part), parts[-1])
    assert distance(torch.stack(parts).double().sum(0), fused_moe(*args, weights)) < TOLERANCE


def test_compiled_slices_take_global_ids() -> None:
    weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(E, H, INTER)).expert_parallel(1, 2)
    x, topk_weights, topk_ids = call()
    compiled = torch.compile(lambda *args: fused_moe(*args, weights), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, topk_weights, topk_ids), fused_moe(x, topk_weights, topk_ids, weights))


def run_ranks(tmp_path: Path, world: int, *, tp_size: int, device: str) -> None:
    """Starts the example on every rank with one layer, and compares what they agree on with one process."""
    file = tmp_path / "model.safetensors"
    checkpoint = oracles.random_gpt_oss_checkpoint(file, num_experts=E, hidden_size=H, intermediate_size=INTER)
    x, topk_weights, topk_ids = call()
    torch.save({"hidden_states": x, "topk_weights": topk_weights, "topk_ids": topk_ids}, tmp_path / "call.pt")
    package = Path(mxfp4_moe.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, str(EXAMPLE), "--checkpoint", str(file), "--call", str(tmp_path / "call.pt")),
                *("--output", str(tmp_path / f"out{rank}.pt"), "--tp-size", str(tp_size), "--device", device),
            ],
            env={
                **environment,
                **{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)},
                "MXFP4_MOE_RENDEZVOUS": f"file://{tmp_path}/rendezvous",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)

    whole = fused_moe(x, topk_weights, topk_ids, MoEWeights.from_mxfp4(**checkpoint))
    outputs = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(world)]
    for output in outputs:
        assert torch.equal(output, outputs[0]), "every rank has the sum"
    assert distance(outputs[0], whole) < TOLERANCE


@pytest.mark.parametrize(("world", "tp_size"), [(2, 1), (2, 2), (4, 2)])
def test_processes_on_cpu(tmp_path: Path, world: int, tp_size: int) -> None:
    run_ranks(tmp_path, world, tp_size=tp_size, device="cpu")


@pytest.mark.multigpu
@pytest.mark.parametrize("tp_size", [1, 2])
def test_two_gpus(tmp_path: Path, tp_size: int) -> None:
    run_ranks(tmp_path, 2, tp_size=tp_size, device="cuda")
