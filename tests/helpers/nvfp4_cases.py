"""NVFP4 layers as checkpoints store them, and what they are in float64."""

from __future__ import annotations

from typing import Any

import fp4_oracles
import numpy as np
import oracles
import torch

from mxfp4_moe.weights import MoEWeights

E, H, I = 3, 96, 80  # noqa: E741  (the formulas' names)


def random_nvfp4(
    kind: str = "multiply",
    *,
    experts: int = E,
    hidden: int = H,
    inter: int = I,
    gated: bool = True,
    inputs: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Arguments of `MoEWeights.from_nvfp4`: random codes, block scales around 1, float32 scales of no round number."""
    g = torch.Generator().manual_seed(seed)
    width = 2 * inter if gated else inter

    def codes(n: int, k: int) -> torch.Tensor:
        return torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, generator=g)

    def blocks(n: int, k: int) -> torch.Tensor:
        return torch.randint(0x28, 0x50, (experts, n, k // 16), dtype=torch.uint8, generator=g)

    def scales(*shape: int, around: float) -> torch.Tensor:
        made = around * (0.5 + torch.rand(shape, generator=g))
        return made if kind == "multiply" else 1.0 / made

    end, of_inputs = ("scale_2", "input_scale") if kind == "multiply" else ("global_scale", "input_global_scale")
    parts = (2,) if gated else (1,)
    made = {
        "w13": codes(width, hidden),
        "w13_scale": blocks(width, hidden),
        "w2": codes(hidden, inter),
        "w2_scale": blocks(hidden, inter),
        f"w13_{end}": scales(experts, *parts, around=0.1 / hidden**0.5),
        f"w2_{end}": scales(experts, around=0.1 / inter**0.5),
    }
    if inputs:
        made[f"w13_{of_inputs}"] = scales(experts, *parts, around=6.0 / 2688)
        made[f"w2_{of_inputs}"] = scales(experts, around=16.0 / 2688)
    return made


def with_biases(layer: dict[str, torch.Tensor], seed: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    biases = {name: torch.randn(layer[name].shape[:2], generator=g) for name in ("w13", "w2")}
    return layer | {f"{name}_bias": bias for name, bias in biases.items()}


def float64_weights(layer: dict[str, torch.Tensor], order: str, *, gated: bool = True) -> tuple[np.ndarray, ...]:
    """(gate, up, down) [E, .., K] in float64; gate alone, and no up, where there is none."""
    divide = "w13_global_scale" in layer
    end = "global_scale" if divide else "scale_2"
    factors = [layer[f"{name}_{end}"].numpy() for name in ("w13", "w2")]
    if divide:
        factors = [(np.float32(1) / factor).astype(np.float32) for factor in factors]
    w13, w2 = (fp4_oracles.nvfp4_values(layer[name].numpy(), layer[f"{name}_scale"].numpy()) for name in ("w13", "w2"))
    down = w2 * factors[1].astype(np.float64)[:, None, None]
    parts = factors[0].astype(np.float64)[:, :, None, None]
    if not gated:
        return w13 * parts[:, 0], down
    gate, up = oracles.gate_up_rows(order, w13.shape[1] // 2)
    return w13[:, gate] * parts[:, 0], w13[:, up] * parts[:, 1], down


def same(a: MoEWeights, b: MoEWeights) -> bool:
    """All fields alike, bit for bit."""

    def flat(weights: MoEWeights) -> dict[str, Any]:
        fields = dict(weights.__getstate__())
        scales = fields.pop("tensor_scales")
        return fields | ({} if scales is None else {f"scales.{name}": value for name, value in vars(scales).items()})

    left, right = flat(a), flat(b)
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) if isinstance(left[name], torch.Tensor) else left[name] == right[name]
        for name in left
    )
