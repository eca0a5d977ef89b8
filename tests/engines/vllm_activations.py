"""Compares each activation that our decision takes with vLLM's own module of it, in float32; prints the differences.

vllm_activations.py MODEL
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import activation as modules
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from mxfp4_moe import reference

# What a layer says beside the activation's name, and vLLM's module with the same numbers.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "silu": ({}, modules.SiluAndMul),
    "silu, clamped": ({"swiglu_limit": 2.5}, lambda: modules.SiluAndMulWithClamp(2.5)),
    "swigluoai_uninterleave": (
        {"swiglu_limit": 2.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        lambda: modules.SiluAndMulWithClamp(2.0, 1.702, 1.0),
    ),
    "gelu": ({}, lambda: modules.GeluAndMul("none")),
    "gelu_tanh": ({}, lambda: modules.GeluAndMul("tanh")),
    "swiglustep": ({}, modules.SwigluStepAndMul),
    "situ": ({"situ": (4.0, None)}, lambda: modules.SituAndMul(4.0)),
    "situ, both": ({"situ": (1.5, 2.0)}, lambda: modules.SituAndMul(1.5, 2.0)),
}


def main() -> None:
    config = EngineArgs(sys.argv[1], skip_tokenizer_init=True).create_engine_config()
    from mxfp4_moe.integrations._vllm_decide import _numbers

    g = torch.Generator().manual_seed(3)
    gate, up = (6 * torch.randn(5, 64, generator=g, dtype=torch.float32) for _ in range(2))
    sums = torch.stack([half.view(5, 8, 8) for half in (gate, up)], 2).flatten(1)  # groups of 8 gates, then their ups
    with set_current_vllm_config(config):
        for name, (says, module) in CASES.items():
            situ = says.get("situ", (None, None))
            moe = {"activation": MoEActivation(name.partition(",")[0])}
            moe |= {"activation_situ_beta": situ[0], "activation_situ_linear_beta": situ[1]}
            numbers = {key: says.get(key) for key in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")}
            found = _numbers(SimpleNamespace(moe_config=SimpleNamespace(**moe), **numbers), False)
            assert found is not None, name
            ours = reference.activate(
                sums,
                torch.zeros(5, dtype=torch.int64),
                None,
                found["activation"],
                found.get("alpha", 1.702),
                found.get("beta", 1.0),
                found.get("limit"),
            )
            theirs = module().forward_native(torch.cat([gate, up], 1))
            print(f"{name}: {(ours - theirs).norm() / theirs.norm():.3e}")


if __name__ == "__main__":
    main()
