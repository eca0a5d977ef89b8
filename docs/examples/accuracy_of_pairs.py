"""How far from exact a layer is with each pair of formats that a CPU computes: the second table of docs/accuracy.md.

    python docs/examples/accuracy_of_pairs.py [--small]

Random float weights of gpt-oss's experts are quantized to MXFP4 and to NVFP4. The exact layer is computed here in
float64 from the quantized weights and from activations as they come, so that what is measured is what the activations
cost. What quantizing the weights costs is printed beside it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats
from mxfp4_moe.weights import MoEWeights

EXPERTS, TOKENS = 2, 6
ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0


def matrices(weights: MoEWeights) -> tuple[Tensor, Tensor]:
    """w13 [E, 2I, H] and w2 [E, H, I] as they are after quantizing, float64."""
    if weights.tensor_scales is None:
        plain = weights.to_mxfp4()
        return (
            formats.dequantize_mxfp4(plain.w13, plain.w13_scale).double(),
            formats.dequantize_mxfp4(plain.w2, plain.w2_scale).double(),
        )
    made = weights.to_nvfp4()
    rows = made.w13_scale_2.repeat(1, weights.intermediate_size).double()  # gate, up, gate, up ...
    w13 = formats.nvfp4_products(made.w13, made.w13_scale).double() * rows.unsqueeze(-1)
    return w13, formats.nvfp4_products(made.w2, made.w2_scale).double() * made.w2_scale_2.double().view(-1, 1, 1)


def exact_layer(w13: Tensor, w2: Tensor, hidden_states: Tensor, ids: Tensor) -> Tensor:
    """One expert for each token, SwiGLU with gpt-oss's numbers, float64 [T, H]."""
    sums = torch.einsum("tnh,th->tn", w13[ids], hidden_states.double())
    gate, up = sums[:, 0::2].clamp(max=LIMIT), sums[:, 1::2].clamp(-LIMIT, LIMIT)
    return torch.einsum("thi,ti->th", w2[ids], gate * torch.sigmoid(ALPHA * gate) * (up + BETA))


def error(found: Tensor, exact: Tensor) -> str:
    return f"{float((found.double() - exact).norm() / exact.norm()):.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the size, for a quick look")
    size = 288 if parser.parse_args().small else 2880
    g = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * size, size, generator=g) / size**0.5
    w2 = torch.randn(EXPERTS, size, size, generator=g) / size**0.5
    ids = torch.arange(TOKENS) % EXPERTS
    normal = torch.randn(TOKENS, size, generator=g)
    large = torch.where(torch.rand(size, generator=g) < 0.01, 30.0, 1.0)
    for name, x in (("normal", normal.bfloat16()), ("large channels", (normal * large).bfloat16())):
        unquantized = exact_layer(w13.double(), w2.double(), x, ids)
        for kind in ("mxfp4", "nvfp4"):
            weights = MoEWeights.from_float(
                w13, w2, format=kind, activation="swiglu_oai", alpha=ALPHA, beta=BETA, limit=LIMIT
            )
            exact = exact_layer(*matrices(weights), x, ids)
            print(f"{name}: weights in {kind}, activations exact: {error(exact, unquantized)} from the float layer")
            for activations in mxfp4_moe.activation_formats("cpu", kind):
                given = x.half() if activations == "fp16" else x  # all but the smallest of these values are in both
                out = mxfp4_moe.fused_moe(
                    given, torch.ones(TOKENS, 1), ids.view(TOKENS, 1), weights, activation_format=activations
                )
                print(f"{name}: {kind}_{activations} {error(out, exact)}", flush=True)


if __name__ == "__main__":
    main()
