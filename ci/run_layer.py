"""Runs one gpt-oss-120b MoE layer through the installed wheel, from a checkpoint file, and checks the result.

    python ci/run_layer.py [--experts N] [--size N] [--device cpu|cuda]

The layer has hidden size and intermediate size 2880, unpadded, and top-4 routing; 128 experts on a GPU, 8 on a CPU.
--size makes both sizes smaller, for a machine that is emulated.
What the wheel computes is compared with a float64 computation straight from the checkpoint's bytes. That computation
is written here, with its own decode tables and its own model of the two MXFP8 quantizations, and shares no code with
the wheel. Exit status 1 when the relative error is above 5e-3 anywhere.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import mxfp4_moe
from mxfp4_moe.tiles import load_manifest, select_tile

SIZE = 2880  # hidden size and intermediate size
TOP_K = 4
TOKENS = (1, 16, 64, 256)
LAYER = 3  # any; its number is part of the tensors' names
PREFIX = f"model.layers.{LAYER}.mlp.experts."
ALPHA, LIMIT = 1.702, 7.0  # gpt-oss's activation
TOLERANCE = 5e-3  # bfloat16 rounds twice after the last GEMM: each row, and each sum of rows
START = time.monotonic()


def progress(text: str) -> None:
    print(f"[{time.monotonic() - START:5.1f} s] {text}", flush=True)


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """A .safetensors file: length of the header, header in JSON, bytes. safetensors' own writer needs numpy."""
    types = {torch.uint8: "U8", torch.bfloat16: "BF16"}
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def write_checkpoint(path: Path, experts: int, size: int, device: torch.device) -> None:
    """Random weights under gpt-oss's names and in its shapes; scales keep every intermediate at a few units."""
    g = torch.Generator(device).manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, dtype=torch.uint8, generator=g, device=device).cpu()

    def biases(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).mul(0.2).bfloat16().cpu()

    tensors = {}
    for name, rows in (("gate_up_proj", 2 * size), ("down_proj", size)):
        tensors[f"{PREFIX}{name}_blocks"] = integers(0, 255, experts, rows, size // 32, 16)
        tensors[f"{PREFIX}{name}_scales"] = integers(118, 122, experts, rows, size // 32)
        tensors[f"{PREFIX}{name}_bias"] = biases(experts, rows)
    save(path, tensors)


# ---- the independent computation -------------------------------------------------------------------------------------

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
FP4_PAIRS = torch.tensor([[FP4[byte % 16], FP4[byte // 16]] for byte in range(256)], dtype=torch.float64)


def decode_weight(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [N, K/32, 16] and [N, K/32] -> float64 [N, K]."""
    values = FP4_PAIRS.to(blocks.device)[blocks.int()].flatten(-2)
    return (values * torch.exp2(scales.double() - 127)[..., None]).flatten(-2)


def floor_log2(x: Tensor) -> Tensor:
    return torch.frexp(x).exponent - 1


def round_to_mxfp8(x: Tensor) -> Tensor:
    """float64 [..., K], its blocks of 32 as MXFP8 gives them back: 3 mantissa bits, exponent from -6, at most 448."""
    blocks = torch.unflatten(x, -1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    ratio = largest / 448
    exponent = floor_log2(ratio) + (ratio > torch.exp2(floor_log2(ratio).double())).int()
    scale = torch.exp2(exponent.double())
    scaled = blocks / scale
    step = torch.exp2(floor_log2(scaled.abs()).clamp(min=-6).double() - 3)
    rounded = (torch.round(scaled / step) * step).clamp(-448, 448) * scale
    return torch.where(largest == 0, 0.0, rounded).flatten(-2)


def expected_output(path: Path, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """The layer in float64, expert by expert, all weights decoded from the file's bytes."""
    device = hidden_states.device
    x = round_to_mxfp8(hidden_states.double())
    out = torch.zeros_like(x)
    with safe_open(path, framework="pt", device=str(device)) as file:
        names = [f"{proj}_{part}" for proj in ("gate_up_proj", "down_proj") for part in ("blocks", "scales", "bias")]
        slices = {name: file.get_slice(PREFIX + name) for name in names}
        for expert in sorted(set(topk_ids.flatten().tolist())):
            part = {name: values[expert].to(device) for name, values in slices.items()}
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            w13 = decode_weight(part["gate_up_proj_blocks"], part["gate_up_proj_scales"])
            h = x[token] @ w13.T + part["gate_up_proj_bias"].double()
            gate, up = h[:, 0::2].clamp(max=LIMIT), h[:, 1::2].clamp(-LIMIT, LIMIT)
            act = round_to_mxfp8(gate / (1 + torch.exp(-ALPHA * gate)) * (up + 1))
            w2 = decode_weight(part["down_proj_blocks"], part["down_proj_scales"])
            y = act @ w2.T + part["down_proj_bias"].double()
            out.index_add_(0, token, topk_weights[token, choice].double()[:, None] * y)
    return out


# ---- the run ---------------------------------------------------------------------------------------------------------


def timed(args: tuple[Tensor, Tensor, Tensor], weights: mxfp4_moe.MoEWeights) -> tuple[Tensor, float]:
    """The layer's output and its time in milliseconds: one call on the CPU, the median of 20 on a GPU."""
    if args[0].device.type == "cpu":
        start = time.perf_counter()
        return mxfp4_moe.fused_moe(*args, weights), (time.perf_counter() - start) * 1e3
    out = mxfp4_moe.fused_moe(*args, weights)
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        mxfp4_moe.fused_moe(*args, weights, output=out)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return out, statistics.median(times)


def run(experts: int, size: int, device: torch.device, folder: Path) -> bool:
    path = folder / "model.safetensors"
    progress(f"writing a checkpoint with {experts} experts")
    write_checkpoint(path, experts, size, device)
    progress(f"{path.stat().st_size / 1e9:.2f} GB written; preparing its weights")
    weights = mxfp4_moe.MoEWeights.from_safetensors(path, layer=LAYER, device=device)
    tiles = load_manifest().tiles
    rows = []
    for tokens in TOKENS:
        progress(f"{tokens} tokens")
        g = torch.Generator(device).manual_seed(tokens)
        logits, topk_ids = torch.randn(tokens, experts, generator=g, device=device).topk(TOP_K)
        hidden_states = torch.randn(tokens, size, generator=g, device=device).bfloat16()
        args = (hidden_states, logits.softmax(-1), topk_ids.int())
        out, milliseconds = timed(args, weights)
        expected = expected_output(path, *args)
        difference = out.double() - expected
        relative = float(difference.norm() / expected.norm())
        tile = select_tile(tokens, TOP_K, experts, tiles)
        rows.append((tokens, tile.name, float(difference.abs().max()), relative, milliseconds))
    progress("done")

    print(f"\n{'tokens':>6}  {'tile':>14}  {'largest error':>13}  {'relative error':>14}  {'time (ms)':>10}")
    for tokens, name, largest, relative, milliseconds in rows:
        print(f"{tokens:>6}  {name:>14}  {largest:>13.3e}  {relative:>14.3e}  {milliseconds:>10.3f}")
    good = all(relative <= TOLERANCE for _, _, _, relative, _ in rows)
    print(f"\nrelative error (norm) at most {TOLERANCE:g} everywhere: {'yes' if good else 'NO'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, help="default: 128 on a GPU, 8 on a CPU")
    parser.add_argument("--size", type=int, default=SIZE, help=f"hidden and intermediate size, default: {SIZE}")
    options = parser.parse_args()
    device = torch.device(options.device)
    experts = options.experts or (128 if device.type == "cuda" else 8)
    if experts < TOP_K:
        parser.error(f"--experts: expected at least {TOP_K}, got {experts}")
    if options.size <= 0 or options.size % 32:
        parser.error(f"--size: expected a positive multiple of 32, got {options.size}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, in plain torch"
    print(f"mxfp4-moe {mxfp4_moe.__version__} from {Path(mxfp4_moe.__file__).parent}, torch {torch.__version__}")
    name = "gpt-oss-120b's MoE layer" if options.size == SIZE else "A MoE layer"
    print(f"{name} on {where}: top-{TOP_K}, hidden size {options.size}, intermediate size {options.size}")
    print(f"{experts} experts" + ("" if experts == 128 else " instead of 128, to keep the run short"))
    if device.type == "cpu":
        print("(the tile in the table is what a GPU would get)")
    with tempfile.TemporaryDirectory() as folder:
        return 0 if run(experts, options.size, device, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
