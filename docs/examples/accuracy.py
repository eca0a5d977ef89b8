"""What activations cost: W4A8 and W4A16 against float64, of one layer and of a whole small random model's logits.

    python docs/examples/accuracy.py             # minutes on a CPU; needs transformers 5
    python docs/examples/accuracy.py --device cuda

W4A8 is this library's layer with MXFP8 activations. W4A16 is its layer with bfloat16 activations where the library has
that for the device; elsewhere it is written out here: bfloat16 rows into float64 sums, and bfloat16 between the GEMMs
and behind them. docs/accuracy.md has the tables that this prints.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mxfp4_moe
from mxfp4_moe.bench.engine.random_model import Sizes, write_gpt_oss
from mxfp4_moe.formats import dequantize_mxfp4

ALPHA, LIMIT = 1.702, 7.0
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Exact:
    """gpt-oss's experts in float64, from MXFP4's values; `rounded` is what inputs, activations and rows get."""

    def __init__(self, raw: dict[str, Tensor], rounded: torch.dtype | None = None) -> None:
        self.w13 = dequantize_mxfp4(raw["w13"], raw["w13_scale"]).double()
        self.w2 = dequantize_mxfp4(raw["w2"], raw["w2_scale"]).double()
        self.w13_bias, self.w2_bias = raw["w13_bias"].double(), raw["w2_bias"].double()
        self.rounded = rounded

    def _round(self, values: Tensor) -> Tensor:
        return values if self.rounded is None else values.to(self.rounded).double()

    def __call__(self, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        x, out = self._round(hidden.double()), torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
        for expert in topk_ids.unique().tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            both = x[token] @ self.w13[expert].T + self.w13_bias[expert]
            gate, up = both[:, ::2].clamp(max=LIMIT), both[:, 1::2].clamp(-LIMIT, LIMIT)
            between = self._round(gate * torch.sigmoid(ALPHA * gate) * (up + 1))
            rows = self._round(between @ self.w2[expert].T) + self.w2_bias[expert]
            out.index_add_(0, token, topk_weights[token, slot, None].double() * rows)
        return self._round(out)


def layers(raw: dict[str, Tensor]) -> dict[str, Layer]:
    """Both kinds of activations, by name, as functions of bfloat16 hidden states."""
    weights = mxfp4_moe.MoEWeights.from_mxfp4(**raw)
    formats = getattr(mxfp4_moe, "activation_formats", lambda device: ("mxfp8",))(weights.device)

    def call(**keywords: Any) -> Layer:
        def layer(hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            return mxfp4_moe.fused_moe(
                hidden.bfloat16(), topk_weights.float().contiguous(), topk_ids.contiguous(), weights, **keywords
            )

        return layer

    ours = "bf16" in formats and "activation_format" in inspect.signature(mxfp4_moe.fused_moe).parameters
    return {
        "W4A8": call(),
        "W4A16" if ours else "W4A16, written out": call(activation_format="bf16")
        if ours
        else Exact(raw, rounded=torch.bfloat16),
    }


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def one_layer(device: torch.device, experts: int, hidden: int, inter: int, tokens: int) -> None:
    """Prints the error of a layer of gpt-oss's size, for plain hidden states and for ones with outlier channels."""
    g = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8).to(device)

    raw = {
        "w13": integers(0, 256, experts, 2 * inter, hidden // 2),
        "w13_scale": integers(118, 123, experts, 2 * inter, hidden // 32),
        "w2": integers(0, 256, experts, hidden, inter // 2),
        "w2_scale": integers(118, 123, experts, hidden, inter // 32),
        "w13_bias": (0.1 * torch.randn(experts, 2 * inter, generator=g)).bfloat16().to(device),
        "w2_bias": (0.1 * torch.randn(experts, hidden, generator=g)).bfloat16().to(device),
    }
    exact, kinds = Exact(raw), layers(raw)
    logits = torch.randn(tokens, experts, generator=g).to(device)
    topk_weights, topk_ids = mxfp4_moe.topk_softmax(logits, 4)
    print(f"\none layer: {experts} experts, hidden {hidden}, intermediate {inter}, {tokens} tokens, {device}")
    for name, factor in (("normal", 1.0), ("1 % of the channels 30 times as large", 30.0)):
        states = torch.randn(tokens, hidden, generator=g)
        states[:, torch.randperm(hidden, generator=g)[: hidden // 100]] *= factor
        states = (states / states.pow(2).mean(1, keepdim=True).sqrt()).bfloat16().to(device)
        expected = exact(states, topk_weights, topk_ids)
        errors = {kind: relative(layer(states, topk_weights, topk_ids), expected) for kind, layer in kinds.items()}
        print(f"  {name}: " + ", ".join(f"{kind} {100 * error:.2f} %" for kind, error in errors.items()))


class Experts(nn.Module):
    """Stands where transformers' experts stood, in a model of float64."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden_states [..., H] -> the same shape."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.layer(rows, routing_weights, router_indices).double().view(hidden_states.shape)


def whole_model(device: torch.device, sizes: Sizes, prompts: int, length: int) -> None:
    """Prints what the experts' activations do to a model's logits, everything else in float64."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    with tempfile.TemporaryDirectory() as folder:
        path = write_gpt_oss(Path(folder) / "model", sizes)
        model = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16, attn_implementation="eager"
        )
        raw = [
            mxfp4_moe.MoEWeights.from_safetensors(path, layer=number).to_mxfp4()._asdict()
            for number in range(sizes.layers)
        ]
    model = model.double().to(device)
    raw = [{name: tensor.to(device) for name, tensor in layer.items()} for layer in raw]
    tokens = torch.randint(3, sizes.vocabulary, (prompts, length), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    kinds = {"exact": [Exact(layer) for layer in raw]}
    for layer in raw:
        for kind, function in layers(layer).items():
            kinds.setdefault(kind, []).append(function)  # type: ignore[arg-type]
    logits = {}
    for kind, functions in kinds.items():
        changed = copy.deepcopy(model)
        for block, function in zip(changed.model.layers, functions, strict=True):
            block.mlp.experts = Experts(function)
        with torch.no_grad():
            logits[kind] = changed(tokens).logits.double().flatten(0, 1)
        del changed
    exact = logits.pop("exact")
    log_p = exact.log_softmax(-1)
    best = log_p.argmax(-1)
    print(f"\na model: {sizes}, {prompts} prompts of {length} tokens, {device}")
    for kind, got in logits.items():
        log_q = got.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        change = (log_p - log_q).gather(1, best[:, None]).abs()
        print(
            f"  {kind}: logits {100 * relative(got, exact):.2f} %, KL {float(divergence):.2e}, |d log p| of the "
            f"likeliest token: mean {float(change.mean()):.4f}, largest {float(change.max()):.3f}; same token first "
            f"{100 * float((log_q.argmax(-1) == best).double().mean()):.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="smaller sizes: whether it runs")
    arguments = parser.parse_args()
    device = torch.empty(0, device=arguments.device).device
    if arguments.small:
        one_layer(device, 4, 128, 96, 8)
        sizes = Sizes(layers=2, experts=4, hidden=128, intermediate=96, heads=4, kv_heads=2, vocabulary=256)
        whole_model(device, sizes, 1, 16)
        return
    one_layer(device, 8, 2880, 2880, 64)
    sizes = Sizes(layers=6, experts=16, hidden=256, intermediate=256, heads=4, kv_heads=2, vocabulary=1024)
    whole_model(device, sizes, 8, 32)


if __name__ == "__main__":
    main()
