"""SGLang's layers on a CPU with ours in their place: `auto` means it, and it computes what `fused_moe` does.

`ci/engines.sh sglang` makes the environment. SGLang has no CPU engine in its wheel, so no server is started: its
arguments, block, loader, router, dispatcher and all-reduce are its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gpt_oss import EXPERTS, HIDDEN, INTER, write_gpt_oss

from mxfp4_moe import MoEWeights, fused_moe

pytestmark = pytest.mark.engines

LAYER = 1
OURS = {"MXFP4_MOE_CPU": "1", "MXFP4_MOE_ACTIVATIONS": "mxfp8", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt_oss(tmp_path_factory.mktemp("gpt-oss"))


def start(model: Path, out: Path, ranks: int, *more: str, **settings: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(__file__).with_name("sglang_program.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, program, str(model), str(out), str(LAYER), *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **OURS, **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def seen(ran: subprocess.CompletedProcess[str], out: Path, ranks: int) -> list[dict[str, Any]]:
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "more"), [(1, ()), (2, ()), (2, ("--ep",))], ids=["one", "TP 2", "EP 2"])
def test_a_block_of_sglang_runs_our_layer(ranks: int, more: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    ran = start(model, tmp_path, ranks, *more, MXFP4_MOE_VERIFY="1")
    found = seen(ran, tmp_path, ranks)
    said = ran.stdout + ran.stderr
    assert "mxfp4-moe runs this model's experts: MXFP8 activations (W4A8), as MXFP4_MOE_ACTIVATIONS says" in said
    verified = "cannot verify" if more else "verified"
    assert f"mxfp4-moe {verified} model.layers.1.mlp.experts" in said
    for rank, saw in enumerate(found):
        assert (saw["backend"], saw["method"]) == ("mxfp4_moe", "mxfp4_moe.integrations._sglang_method")
        experts = EXPERTS // ranks if more else EXPERTS
        assert saw["shapes"]["w13_weight"][0] == saw["shapes"]["w2_weight"][0] == experts
        ids = saw["local_ids"]
        if more:
            begin = rank * experts
            here = (saw["topk_ids"] >= begin) & (saw["topk_ids"] < begin + experts)
            assert torch.equal(ids.long(), torch.where(here, saw["topk_ids"].long() - begin, -1))
        assert torch.equal(saw["part"], computed_again(model, saw, rank, ranks, bool(more)))
    total = torch.stack([saw["part"].float() for saw in found]).sum(0)
    for saw in found:  # the block's all-reduce adds in bfloat16
        assert torch.allclose(saw["whole"].float(), total, rtol=2**-7, atol=2**-7 * float(total.abs().max()))
    assert float(total.norm()) > 0


def computed_again(
    model: Path, saw: dict[str, Any], rank: int, ranks: int, ep: bool, activation_format: str = "mxfp8"
) -> torch.Tensor:
    """A rank's part by `fused_moe` on weights that `MoEWeights` reads and cuts."""
    split = {"ep_rank": rank, "ep_size": ranks} if ep else {"tp_rank": rank, "tp_size": ranks}
    weights = MoEWeights.from_safetensors(model, layer=LAYER, **split)
    assert weights.hidden_size == HIDDEN
    assert weights.num_experts * (1 if ep else ranks) * weights.intermediate_size >= INTER
    routed = (saw["topk_weights"].float(), saw["topk_ids"])
    return fused_moe(saw["x"], *routed, weights, activation_format=activation_format)


def test_without_being_asked_the_numbers_are_sglangs(model: Path, tmp_path: Path) -> None:
    """W4A16, as SGLang computes where there is no SM120."""
    ran = start(model, tmp_path, 1, MXFP4_MOE_ACTIVATIONS="engine", MXFP4_MOE_VERIFY="1")
    (saw,) = seen(ran, tmp_path, 1)
    said = ran.stdout + ran.stderr
    assert "mxfp4-moe runs this model's experts: bfloat16 activations (W4A16), as SGLang computes" in said
    assert "mxfp4-moe verified model.layers.1.mlp.experts" in said
    assert torch.equal(saw["part"], computed_again(model, saw, 0, 1, False, "bf16"))
    assert not torch.equal(saw["part"], computed_again(model, saw, 0, 1, False, "mxfp8"))


def test_float16_is_not_what_sglang_computes_in(model: Path, tmp_path: Path) -> None:
    """SGLang makes every MXFP4 gpt-oss bfloat16, so float16 activations have no model to be for."""
    ran = start(model, tmp_path, 1, MXFP4_MOE_ACTIVATIONS="fp16")
    assert (
        "mxfp4-moe is not used, SGLang's own kernels run this model's experts: float16 activations (W4A16), as "
        "MXFP4_MOE_ACTIVATIONS says, take a float16 model, and this one is computed in bfloat16"
    ) in ran.stderr


def test_a_cpu_is_left_to_sglang(model: Path, tmp_path: Path) -> None:
    """And so is a backend that was asked for by name, with an error that says why."""
    ran = start(model, tmp_path, 1, MXFP4_MOE_CPU="0")
    assert "mxfp4-moe is not used, SGLang's own kernels run this model's experts: there is no CUDA GPU" in ran.stderr
    ran = start(model, tmp_path, 1, "--backend", "mxfp4_moe", MXFP4_MOE_CPU="0")
    assert ran.returncode != 0
    assert "ValueError: --moe-runner-backend mxfp4_moe: there is no CUDA GPU; MXFP4_MOE_CPU=1 takes" in ran.stderr
