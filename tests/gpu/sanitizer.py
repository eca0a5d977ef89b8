"""Every kernel of the wheel once on small problems, to be run under compute-sanitizer:

    PYTHONPATH=tests/helpers compute-sanitizer --tool memcheck python tests/gpu/sanitizer.py

Then with racecheck, synccheck and initcheck. With an argument such as 3/16, a share of it, for several processes at a
time (ci/gpu.sh).

Results are compared too, so that a clean report of a kernel that did nothing counts for nothing. What they are compared
with is computed on the CPU: torch's kernels would be instrumented like ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import router_cases
import torch
from gpu_layers import exact_formats, exact_layer, same
from gpu_problems import Call, GemmProblem, bits, gpu, random_call, random_problem, random_weights
from quantize_cases import LAYOUTS, expected_fp4, rows_of

import mxfp4_moe
from mxfp4_moe import formats, reference
from mxfp4_moe._call.activation_format import tiles_of
from mxfp4_moe.activations import Activation
from mxfp4_moe.flashinfer_api import quantize_kernels, quantizers
from mxfp4_moe.formats import WeightFormat
from mxfp4_moe.pair_problems import random_nvfp4_weights
from mxfp4_moe.problems import arithmetic_here, relative_error
from mxfp4_moe.reference import routers as reference_routers
from mxfp4_moe.tiles import Tile, load_manifest
from mxfp4_moe.weights import MoEWeights

# Tails of every kind, in rows, N and K; two of K's tiles at least, so that the pipeline turns over.
GEMMS = [(32, 16), (160, 80), (672, 144)]
ROWS_PER_EXPERT = (0, 1, 9, 65, 130)  # with (8, 64): m-tiles of one, two and eight rows
LAYERS = [(1, 1), (33, 3)]  # tokens, top_k


def other_kernels(device: torch.device) -> list[str]:
    """Every activation, MXFP8 input in both scale layouts, the router and the quantizer, in sizes that leave tails."""
    failures = []
    for number, activation in enumerate(Activation):
        layout = reference.SCALE_LAYOUTS[number % 2]
        weights = random_weights(5, 160, 96, device, activation=activation, alpha=torch.rand(5, device=device))
        call = random_call(33, 3, weights)
        codes, scale = formats.quantize_mxfp8(call.hidden_states)
        call = replace(call, hidden_states=codes)
        scale = formats.swizzle_scales(scale).flatten() if layout == "swizzled" else scale
        out = mxfp4_moe.fused_moe(*call.args(), weights, hidden_states_scale=scale, scale_layout=layout)
        expected = exact_layer(call, weights, hidden_states_scale=scale, scale_layout=layout, sums_on="cpu")
        if not same(out, expected):
            failures.append(f"{activation.value}, MXFP8 input with {layout} scales: other bits than expected")
    weights = random_weights(40, 160, 96, device)
    # One kernel for few slots; two, routed by a block, by a cluster; and with so many that biases are added by strips.
    for tokens in (9, 60, 520, 1366):
        x, logits = random_call(tokens, 3, weights).hidden_states, torch.randn(tokens, 40, device=device)
        out = mxfp4_moe.fused_moe_from_logits(x, logits, 3, weights)
        if not torch.equal(bits(out), bits(mxfp4_moe.fused_moe(x, *mxfp4_moe.topk_softmax(logits, 3), weights))):
            failures.append(f"fused_moe_from_logits of {tokens} tokens: other bits than topk_softmax and fused_moe")
    for experts, top_k in ((1, 1), (40, 16), (1000, 7)):
        logits = torch.randn(9, experts, device=device)
        for renormalize in (True, False):
            _, ids = mxfp4_moe.topk_softmax(logits, top_k, renormalize)
            if not torch.equal(ids, reference.topk_softmax(logits, top_k, renormalize)[1]):
                failures.append(f"topk_softmax of {experts} experts, top_k {top_k}: other experts than expected")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (9, 515):  # a row a lane, and several
            x = rows_of(rows, 160, dtype).to(device)
            for scale_layout in LAYOUTS:
                found = quantize_kernels.mxfp8(x, 256, scale_layout)
                wanted = quantizers._mxfp8_torch(x, 256, scale_layout)
                if not all(torch.equal(a, b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True)):
                    failures.append(f"mxfp8_quantize of {rows} rows of {dtype}, layout {scale_layout}: other bytes")
                for scale in (None, torch.ones((), device=device)) if dtype.itemsize == 2 else ():
                    found = quantize_kernels.fp4("fp4_quantize", x, scale, scale_layout)
                    if not all(map(torch.equal, (one.cpu() for one in found), expected_fp4(x, scale, scale_layout))):
                        failures.append(f"fp4_quantize of {rows} rows of {dtype}, layout {scale_layout}: other bytes")
    return failures


def routers(device: torch.device) -> list[str]:
    """Every rule alone and in the layer, with few slots and with many, and experts that are given."""
    failures = []
    for name in router_cases.ROUTERS:
        experts, router = router_cases.router_named(name)
        bias = router.e_score_correction_bias
        own = replace(router, e_score_correction_bias=None if bias is None else bias.to(device))
        made = random_weights(experts, 64, 32, torch.device("cpu"))
        weights = made.to(device)
        for tokens in (3, 70):
            logits = router_cases.logits_of(tokens, experts, torch.float32).to(device)
            x = random_call(tokens, 1, made).hidden_states.to(device)
            topk_weights, ids = mxfp4_moe.select_experts(logits, own)
            if not torch.equal(ids.cpu(), reference_routers.select_experts(logits.cpu(), router)[1]):
                failures.append(f"select_experts, {name}, {tokens} tokens: other experts than expected")
            out = mxfp4_moe.fused_moe_from_logits(x, logits, own, weights)
            two_calls = mxfp4_moe.fused_moe(x, topk_weights, ids, weights)
            if not torch.equal(bits(out.cpu()), bits(two_calls.cpu())):
                failures.append(f"fused_moe_from_logits, {name}, {tokens} tokens: other bits than the two calls")
            again, _ = mxfp4_moe.select_experts(logits, own, ids)
            if not router.is_topk_softmax and not torch.equal(bits(again.cpu()), bits(topk_weights.cpu())):
                failures.append(f"select_experts, {name}, {tokens} tokens: given experts have other weights")
        print(f"router {name}", flush=True)
    return failures


def problem_on(device: torch.device, k: int, n: int, *, wide_scales: bool = False) -> GemmProblem:
    rule = arithmetic_here(device)
    made = random_problem(
        k, n, torch.device("cpu"), rows_per_expert=ROWS_PER_EXPERT, wide_scales=wide_scales, arithmetic=rule
    )
    return replace(made, **{name: x.to(device) for name, x in vars(made).items() if isinstance(x, torch.Tensor)})


def expected_of(call: Call, weights: MoEWeights, activation_format: str) -> torch.Tensor:
    """`reference.fused_moe`, on the CPU."""
    given = (x.cpu() for x in call.args())
    return reference.fused_moe(*given, weights.to("cpu"), activation_format=activation_format).to(weights.device)


def nvfp4_layers(tiles: Sequence[Tile], device: torch.device) -> list[str]:
    """Layers of NVFP4 weights by these tiles, with every format of activations."""
    failures = []
    for acts in mxfp4_moe.activation_formats(device, "nvfp4"):
        given = random_nvfp4_weights(5, 160, 96, device, inputs=False)
        weights = given.to(device, activation_format=acts)
        for tokens, top_k in LAYERS:
            call = random_call(tokens, top_k, given)
            if acts == "fp16":
                call = replace(call, hidden_states=call.hidden_states.half())
            expected = expected_of(call, given, acts)
            for tile in tiles:
                if tile not in tiles_of(acts, device.index, WeightFormat.NVFP4):
                    continue
                out = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=tile.mn, activation_format=acts)
                if not relative_error(out, expected) <= 2e-2:  # torch's exp makes another code now and then
                    failures.append(f"{tile.name}, nvfp4_{acts}, layer of {tokens} tokens: far from what was expected")
    return failures


def main() -> int:
    device, start = gpu(), time.monotonic()
    share, shares = map(int, sys.argv[1].split("/")) if sys.argv[1:] else (0, 1)
    if not 0 <= share < shares:
        sys.exit(f"share: expected a number below {shares} before the /, got {sys.argv[1]}")
    tiles = load_manifest().tiles[share::shares]
    failures = []
    problems = {(k, n): problem_on(device, k, n) for k, n in GEMMS}
    wide = (128, 96)  # with weight scales beyond 2^0, for which SM90 has a way of its own
    problems[wide] = problem_on(device, *wide, wide_scales=True)
    print(f"problems, {time.monotonic() - start:.0f} s", flush=True)
    weights = random_weights(5, 160, 96, device)
    calls = [random_call(tokens, top_k, weights) for tokens, top_k in LAYERS]
    calls[1].topk_ids[::5, 1] = -1
    formats_here = mxfp4_moe.activation_formats(device)
    asked = [(call, name) for call in calls for name in exact_formats(device)]
    in_fp16 = [replace(call, hidden_states=call.hidden_states.half()) for call in calls if "fp16" in formats_here]
    exact_in_fp16 = [expected_of(call, weights, "fp16") for call in in_fp16]
    having_fp16, of_fp16 = tiles_of("fp16", device.index), weights.to(device, activation_format="fp16")
    expected = [exact_layer(call, weights, activation_format=name, sums_on="cpu") for call, name in asked]
    print(f"expected results, {time.monotonic() - start:.0f} s", flush=True)
    for number, tile in enumerate(tiles, start=1):
        for (k, n), problem in problems.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                mismatch = problem.check(tile, dtype)
                failures += [f"{tile.name}, K={k}, N={n}, {dtype}: {mismatch}"] if mismatch else []
        for (call, name), wanted in zip(asked, expected, strict=True):
            for _ in range(2):
                out = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=tile.mn, activation_format=name)
                if not same(out, wanted):
                    failures.append(f"{tile.name}, {name}, layer of {len(out)} tokens: other bits than expected")
        for call, wanted in zip(in_fp16, exact_in_fp16, strict=True) if tile in having_fp16 else ():
            out = mxfp4_moe.fused_moe(*call.args(), of_fp16, tile_mn=tile.mn, activation_format="fp16")
            if not relative_error(out, wanted) <= 1e-3:
                failures.append(f"{tile.name}, fp16, layer of {len(out)} tokens: far from what was expected")
        torch.cuda.synchronize()
        print(f"tile {number} of {len(tiles)}: {tile.name}, {time.monotonic() - start:.0f} s", flush=True)
    failures += nvfp4_layers(tiles, device)
    others = (other_kernels, routers)
    for number, check in enumerate(others, start=1):  # the last shares, which have fewer tiles
        if share == max(shares - number, 0):
            failures += check(device)
    print("\n".join(failures) or "all results as expected")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
