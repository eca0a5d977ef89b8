"""Slow, plain counterparts of the library's functions, written from the formulas with numpy and ml_dtypes only.

They share no code with the library, so that a mistake would have to be made twice.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

from mxfp4_moe.arithmetic import Arithmetic

E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = ml_dtypes.float4_e2m1fn
E8M0 = ml_dtypes.float8_e8m0fnu


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal float32 bits, so -0 is not +0; every NaN counts as the same."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    nan = np.isnan(a) & np.isnan(b)
    return a.shape == b.shape and bool(((a.view(np.uint32) == b.view(np.uint32)) | nan).all())


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    return codes.view(E4M3).astype(np.float64)


def e4m3_codes(values: np.ndarray) -> np.ndarray:
    """RNE with saturation, NaN -> 0x7F."""
    with np.errstate(all="ignore"):
        codes = np.clip(values, -448, 448).astype(E4M3).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), codes)


def mma_block(
    a: np.ndarray,
    b: np.ndarray,
    a_scale: np.ndarray,
    b_scale: np.ndarray,
    acc: np.ndarray,
    rule: Arithmetic,
    *,
    unit: Fraction = Fraction(1),
) -> np.ndarray:
    """One block under a rule, in fractions: E4M3 codes [M, 32], E2M1 codes [N, 32] as 0..15, E8M0, float32 [M, N].

    Everything must be finite. The operands b of a rule that takes bfloat16 are multiplied by the unit.
    """
    out = np.empty_like(acc)
    for i, j in np.ndindex(acc.shape):
        scale = int(a_scale[i]) + int(b_scale[j]) - 254
        x = [_parts(value, -6) for value in e4m3_values(a[i])]
        y = [_parts(value, 0) for value in b[j].view(E2M1).astype(np.float64)]
        if rule.operands == "bf16":
            x = [_parts(value * Fraction(2) ** e * Fraction(2) ** (int(a_scale[i]) - 127), -126) for value, e in x]
            y = [
                _parts(value * Fraction(2) ** e * Fraction(2) ** (int(b_scale[j]) - 127) * unit, -126) for value, e in y
            ]
            scale = 0
        value = float(acc[i, j])
        for k in range(0, 32, rule.products):
            products = [(s * t, e + f + scale) for (s, e), (t, f) in zip(x[k:], y[k:], strict=True)][: rule.products]
            value = _mma_step(products, scale, value, rule)
        out[i, j] = value
    return out


def _mma_step(products: list[tuple[Fraction, int]], scale: int, acc: float, rule: Arithmetic) -> float:
    if rule.bits is None:
        block = sum(s * Fraction(2) ** (e - scale) for s, e in products)
        factor = min(Fraction(2) ** scale, Fraction(2) ** 128) if scale >= -149 else 0
        product = Fraction(_float32(Fraction(_float32(block, rule)) * factor, rule))
        return _float32(Fraction(acc) + product, rule)
    terms = [*products, _parts(acc, -126)]
    top = max((e for s, e in terms if s), default=-133)
    unit = Fraction(2) ** (max(top, -133) - rule.bits)
    return _float32(sum(_whole(s * Fraction(2) ** e / unit, rule) * unit for s, e in terms), rule)


def _parts(value: float | Fraction, lowest: int) -> tuple[Fraction, int]:
    """Significand and exponent of a number as its format stores it."""
    x = Fraction(value)
    e = max(abs(x.numerator).bit_length() - x.denominator.bit_length(), lowest)  # or one less than it must be
    e += abs(x) >= Fraction(2) ** (e + 1)
    return x / Fraction(2) ** e, e


def _whole(x: Fraction, rule: Arithmetic) -> int:
    return math.trunc(x) if rule.rounding == "cut" else round(x)


def _float32(x: Fraction | int, rule: Arithmetic) -> float:
    """Of numbers below 2^128."""
    if not x:
        return 0.0
    e = max(_parts(x, -126)[1] - 23, -149)
    return float(_whole(Fraction(x) / Fraction(2) ** e, rule) * Fraction(2) ** e)


def e2m1_values(packed: np.ndarray) -> np.ndarray:
    """[..., K/2] packed bytes -> float64 [..., K]."""
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
    return nibbles.view(E2M1).astype(np.float64)


def mxfp4_values(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[..., K/2] and [..., K/32] -> float64 [..., K]."""
    return e2m1_values(packed) * np.repeat(np.exp2(scales.astype(np.float64) - 127), 32, axis=-1)


def mxfp8_values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[..., K] and [..., K/32] -> float64 [..., K]."""
    return e4m3_values(codes) * np.repeat(np.exp2(scales.astype(np.float64) - 127), 32, axis=-1)


def mxfp8_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., K] -> codes uint8 [..., K], scales uint8 [..., K/32]; one block at a time."""
    assert x.dtype == np.float32
    blocks = x.reshape(-1, 32)
    codes = np.zeros(blocks.shape, dtype=np.uint8)
    scales = np.zeros(len(blocks), dtype=np.uint8)
    for i, block in enumerate(blocks):
        if not np.isfinite(block).all():
            codes[i], scales[i] = 0x7F, 127
            continue
        amax = np.abs(block).max()
        if amax == 0:
            continue
        p = float(amax * np.float32(1 / 448))
        fraction, exponent = math.frexp(p)  # p = fraction * 2^exponent, 0.5 <= fraction < 1
        log2_up = exponent - 1 if fraction == 0.5 else exponent
        scales[i] = 0 if p == 0 else min(max(log2_up + 127, 0), 254)
        codes[i] = e4m3_codes(block.astype(np.float64) * 2.0 ** (127 - int(scales[i])))
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], x.shape[-1] // 32)


def scale_offset(row: int, block: int, k: int) -> int:
    """Byte offset of a weight scale in the 128x4 swizzle."""
    k_tiles = -(-k // 128)
    return row // 128 * k_tiles * 512 + block // 4 * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def gemm(
    a: np.ndarray, row_scales: np.ndarray, b: np.ndarray, scales: np.ndarray, rule: Arithmetic, *, unit: Fraction
) -> np.ndarray:
    """Sums over K under a rule, in fractions: `mma_block` after `mma_block`, with weights in a unit.

    E4M3 codes [M, K], E2M1 codes [N, K] as 0..15, E8M0 scales [M, K/32] and [N, K/32] -> float32 [M, N].
    """
    out = np.zeros((len(a), len(b)), dtype=np.float32)
    for i in range(a.shape[1] // 32):
        k = slice(32 * i, 32 * i + 32)
        out = mma_block(a[:, k], b[:, k], row_scales[:, i], scales[:, i], out, rule, unit=unit)
    return (out / np.float32(unit)).astype(np.float32)


def bf16_gemm(a: np.ndarray, b: np.ndarray, scales: np.ndarray, rule: Arithmetic) -> np.ndarray:
    """The same of activations that are bfloat16 numbers, float64 [M, K], with half weights as SM90 has them."""
    out = np.zeros((len(a), len(b)), dtype=np.float32)
    values = b.view(E2M1).astype(np.float64)
    for i, j in np.ndindex(out.shape):
        acc = 0.0
        x = [_parts(value, -126) for value in a[i]]
        y = [
            _parts(Fraction(v) * Fraction(2) ** (int(scales[j, k // 32]) - 128), -126) for k, v in enumerate(values[j])
        ]
        for k in range(0, a.shape[1], rule.products):
            step = slice(k, k + rule.products)
            acc = _mma_step([(s * t, e + f) for (s, e), (t, f) in zip(x[step], y[step], strict=True)], 0, acc, rule)
        out[i, j] = 2 * acc
    return out


def _weight_block(row: int, k_tile: int, n: int, k: int, words: int) -> int:
    """First byte of a prepared weight's block; K tiles before this one are whole."""
    row_blocks = -(-n // 64)
    steps = min(4, k // 32 - 4 * k_tile)
    return k_tile * row_blocks * (256 * words + 4 * 1024) + row // 64 * (256 * words + steps * 1024)


def weight_scale_offset(row: int, block: int, n: int, k: int, words: int = 1) -> int:
    """Where a row's scale of a block of 32 k (words = 2: of 16) lies in one expert's prepared weight [n, k]."""
    in_block, of_tile = row % 64, 4 * words
    position = (0, 2, 1, 3)[in_block // 8 % 4]
    word = in_block // 32 * 128 + in_block % 8 * 16 + position * 4
    return _weight_block(row, block // of_tile, n, k, words) + block % of_tile // 4 * 256 + word + block % 4


def weight_word_offset(row: int, block: int, t: int, n: int, k: int, words: int = 1) -> int:
    """Where word t of a row and block of 32 k lies in one expert's prepared weight [n, k]."""
    in_block = row % 64
    word = in_block // 32 * 512 + (in_block % 8 * 4 + t) * 16 + in_block // 8 % 4 * 4
    return _weight_block(row, block // 4, n, k, words) + 256 * words + block % 4 * 1024 + word


_PAIRS = (  # for each of the pairs k = 2t, 2t + 8, 2t + 16, 2t + 24: where in its half the bits m, e0, e1 and s stand
    ((6, 7, 8), 15),
    ((2, 3, 4), 11),
    ((12, 13, 14), 5 + 16),  # 16 more: in the other half
    ((0, 9, 10), 1 + 16),
)


def weight_words(codes: list[int], order: str) -> list[int]:
    """The four 32-bit words of a block of 32 codes of 4 bits, in "containers", "pairs" or "plain" order."""
    words = []
    for t in range(4):
        word = 0
        if order in ("containers", "plain"):
            for i, code in enumerate(codes[8 * t : 8 * t + 8]):
                word |= code << 4 * i
            if order == "containers":
                word = (word << 2 | word >> 30) & 0xFFFFFFFF
        else:
            for pair, (magnitude, sign) in enumerate(_PAIRS):
                for half, code in enumerate(codes[8 * pair + 2 * t :][:2]):
                    for bit, place in enumerate((*magnitude, sign)):
                        word |= (code >> bit & 1) << (place + 16 * half) % 32
        words.append(word)
    return words


def gate_up_rows(order: str, intermediate_size: int) -> tuple[list[int], list[int]]:
    """Rows of the gates and of the ups in a checkpoint's w13."""
    i = intermediate_size
    first, second, pairs = range(i), range(i, 2 * i), range(0, 2 * i, 2)
    if order == "interleaved":
        return list(pairs), [r + 1 for r in pairs]
    return (list(first), list(second)) if order == "gate_up" else (list(second), list(first))


GATED = ("swiglu", "swiglu_oai", "swiglu_step", "geglu", "geglu_tanh", "situ")
NOT_GATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_relu2", "identity")
_ERFC = np.vectorize(math.erfc, otypes=[np.float64])

Number = float | np.ndarray  # an array broadcasts against the rows


def soft_clamp(x: np.ndarray, limit: Number | None) -> np.ndarray:
    """limit * tanh(x / limit); x without a limit."""
    return x if limit is None else limit * np.tanh(x / limit)


def one_input(x: np.ndarray, activation: str, limit: Number | None = None) -> np.ndarray:
    """An activation that is not gated; float64 in, float64 out."""
    if activation == "silu":
        return x / (1 + np.exp(-x))
    if activation == "gelu":
        return x / 2 * _ERFC(-x / math.sqrt(2))
    if activation == "gelu_tanh":
        with np.errstate(over="ignore"):  # x / infinity is the zero that it should be
            return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    positive = np.maximum(x, 0)
    if activation == "clamped_relu2":
        return soft_clamp(positive, limit) ** 2
    return {"relu": positive, "relu2": positive**2, "identity": x}[activation]


def two_inputs(
    gate: np.ndarray, up: np.ndarray, activation: str, alpha: Number, beta: Number, limit: Number | None
) -> np.ndarray:
    """A gated activation; float64 in, float64 out."""
    bound = np.inf if limit is None else limit
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, bound), np.clip(up, -bound, bound)
        return gate / (1 + np.exp(-alpha * gate)) * (up + beta)
    if activation == "swiglu_step":
        return np.minimum(one_input(gate, "silu"), bound) * np.clip(up, -bound, bound)
    if activation == "situ":
        return soft_clamp(gate, beta) / (1 + np.exp(-gate)) * soft_clamp(up, limit)
    return one_input(gate, {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[activation]) * up


def dense_moe(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    checkpoint: dict[str, torch.Tensor],
    *,
    gate_up_order: str = "interleaved",
    activation: str = "swiglu_oai",
    alpha: float = 1.702,
    beta: float = 1.0,
    limit: float | None = 7.0,
) -> np.ndarray:
    """The layer in float64 from checkpoint tensors (keys as the arguments of from_mxfp4; 3-D blocks), token by token.

    The only roundings are the two that the layer is defined by: MXFP8 before each GEMM.
    """
    tensors = {name: t.float().numpy() if name.endswith("bias") else t.numpy() for name, t in checkpoint.items()}
    experts, _, half = tensors["w13"].shape
    w13 = mxfp4_values(tensors["w13"], tensors["w13_scale"])
    w2 = mxfp4_values(tensors["w2"], tensors["w2_scale"])
    gates, ups = gate_up_rows(gate_up_order, w13.shape[1] // 2)

    def between(h: np.ndarray) -> np.ndarray:
        if activation in NOT_GATED:
            return one_input(h, activation, limit)
        return two_inputs(h[gates], h[ups], activation, alpha, beta, limit)

    x = mxfp8_values(*mxfp8_quantize(hidden_states.float().numpy()))
    out = np.zeros((len(x), 2 * half))
    for t, ids in enumerate(topk_ids.tolist()):
        for j, e in enumerate(ids):
            if not 0 <= e < experts:
                continue
            h = w13[e] @ x[t]
            if "w13_bias" in tensors:
                h = h + tensors["w13_bias"][e]
            act = between(h).astype(np.float32)
            y = w2[e] @ mxfp8_values(*mxfp8_quantize(act))
            if "w2_bias" in tensors:
                y = y + tensors["w2_bias"][e]
            out[t] += float(topk_weights[t, j]) * y
    return out


def random_checkpoint(
    num_experts: int, hidden_size: int, intermediate_size: int, *, seed: int = 0, gated: bool = True
) -> dict[str, torch.Tensor]:
    """MXFP4 weights of one layer with realistic magnitudes, keyed as the arguments of from_mxfp4."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, dtype=torch.uint8, generator=generator)

    def bias(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul(0.2).bfloat16()

    e, h, i = num_experts, hidden_size, intermediate_size
    rows = 2 * i if gated else i
    return {
        "w13": integers(0, 255, e, rows, h // 2),
        "w13_scale": integers(118, 123, e, rows, h // 32),
        "w2": integers(0, 255, e, h, i // 2),
        "w2_scale": integers(118, 123, e, h, i // 32),
        "w13_bias": bias(e, rows),
        "w2_bias": bias(e, h),
    }


def gpt_oss_tensors(checkpoint: dict[str, torch.Tensor], layer: int = 0) -> dict[str, torch.Tensor]:
    """The same tensors under gpt-oss's names, blocks in its four dimensions."""
    prefix = f"model.layers.{layer}.mlp.experts."
    names = {"w13": "gate_up_proj", "w2": "down_proj"}
    tensors = {}
    for short, name in names.items():
        blocks = checkpoint[short]
        tensors[f"{prefix}{name}_blocks"] = blocks.reshape(*blocks.shape[:2], -1, 16)
        tensors[f"{prefix}{name}_scales"] = checkpoint[f"{short}_scale"]
        tensors[f"{prefix}{name}_bias"] = checkpoint[f"{short}_bias"]
    return tensors


def random_gpt_oss_checkpoint(
    path: str | Path, *, num_experts: int, hidden_size: int, intermediate_size: int, layer: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Writes one layer's MoE weights to a .safetensors file with gpt-oss's names; returns them as random_checkpoint."""
    checkpoint = random_checkpoint(num_experts, hidden_size, intermediate_size, seed=seed)
    save_file(gpt_oss_tensors(checkpoint, layer), path)
    return checkpoint
