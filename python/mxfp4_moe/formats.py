"""Number formats and memory layouts of MXFP4 weights and MXFP8 activations.

Everything here is plain vectorised torch and runs on any device. The quantizers and layouts are the oracle for the
CUDA code, so each is written as the formula of its format, bit by bit, and not as the kernel does it.

Bytes travel as uint8: the float8/float4 dtypes of torch differ from version to version, bytes do not.
Sources: OCP Microscaling Formats (MX) v1.0; PTX ISA, "Alternate floating point formats" and "mma with block scaling".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from enum import Enum

import torch
from torch import Tensor

from . import _wheel

BLOCK = 32  # values that share one E8M0 scale (OCP MX v1.0, table 1)
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E8M0_ONE = 127  # the byte of 2^0
E8M0_MAX = 254  # the byte of 2^127; 255 is NaN

# Value of each 4-bit E2M1 code; bit 3 is the sign (OCP MX v1.0, section 5.3.3).
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES: tuple[float, ...] = (*_E2M1_MAGNITUDES, *(-m for m in _E2M1_MAGNITUDES))

WEIGHT_BLOCK_ROWS = 64  # rows of a block of prepared weights; csrc/shared/weight_layout.cuh
_BLOCK_SCALE_BYTES = WEIGHT_BLOCK_ROWS * 4
_STEP_BYTES = WEIGHT_BLOCK_ROWS * 16

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RCP_448 = float.fromhex("0x1.24924ap-9")  # 1/448 rounded to fp32: the kernel multiplies, it does not divide

# Code of a magnitude = how many of these it exceeds. Between codes i and i+1 lies their midpoint; a tie goes to the
# even code, so where that is the upper one (odd i) the bound is the float32 just below the midpoint.
_MIDPOINTS = [(E2M1_VALUES[i] + E2M1_VALUES[i + 1]) / 2 for i in range(7)]
_E2M1_BOUNDS = [m if i % 2 == 0 else m - 2.0 ** (math.frexp(m)[1] - 24) for i, m in enumerate(_MIDPOINTS)]


def describe(tensor: Tensor) -> str:
    """Dtype and shape for error messages: ``"uint8 [4, 5760, 90]"``."""
    return f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"


def require_tensor(
    name: str,
    value: object,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str] | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks one argument and raises an error that names it, what was expected and what came.

    Args:
        name: argument name for the message.
        value: what the caller passed.
        dtypes: allowed dtype or dtypes.
        shape: expected shape; a string stands for a dimension of any size and names it in the message.
        device: expected device, if it matters.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    expected = " or ".join(_dtype_name(d) for d in allowed)
    expected += " tensor" if shape is None else f" [{', '.join(str(s) for s in shape)}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if shape is not None and (
        value.dim() != len(shape) or any(isinstance(s, int) and s != d for s, d in zip(shape, value.shape, strict=True))
    ):
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected {expected} on {device}, got {describe(value)} on {value.device}")


def decode_e2m1(packed: Tensor) -> Tensor:
    """Values of packed E2M1 codes.

    Args:
        packed: uint8 [..., K/2]; the low nibble of byte i is k=2i, the high nibble k=2i+1.

    Returns:
        float32 [..., K].
    """
    require_tensor("packed", packed, torch.uint8)
    values = torch.tensor(E2M1_VALUES, device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # of all 256 bytes
    return torch.nn.functional.embedding(packed.to(torch.int32), pairs).flatten(-2)


def encode_e2m1(x: Tensor) -> Tensor:
    """Packed E2M1 codes of values: round to nearest, ties to even, saturating at +-6.

    Args:
        x: float32, bfloat16 or float16 [..., K], K even; infinities saturate.

    Returns:
        uint8 [..., K/2], low nibble = even k.

    Raises:
        ValueError: odd K, or a NaN (E2M1 has none).
    """
    values = _float32("x", x, 2)
    if bool(values.isnan().any()):
        raise ValueError(f"x: expected no NaN (E2M1 cannot hold one), got {describe(x)} with NaN")
    bounds = torch.tensor(_E2M1_BOUNDS, dtype=torch.float32, device=x.device)
    codes = torch.bucketize(values.abs(), bounds, out_int32=True).to(torch.uint8)
    codes |= values.signbit().to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def decode_e4m3(codes: Tensor) -> Tensor:
    """Values of E4M3 codes (the "fn" kind: no infinities; 0x7F and 0xFF are NaN).

    Args:
        codes: uint8, any shape.

    Returns:
        float32, same shape.
    """
    require_tensor("codes", codes, torch.uint8)
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def encode_e4m3(x: Tensor) -> Tensor:
    """E4M3 codes of values: round to nearest, ties to even, saturating at +-448; any NaN becomes 0x7F.

    This is ``cvt.rn.satfinite.e4m3x2.f32`` of the PTX ISA.

    Args:
        x: float32, bfloat16 or float16, any shape.

    Returns:
        uint8, same shape.
    """
    values = _float32("x", x, 1)
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill_(values.isnan(), E4M3_NAN)


def decode_e8m0(scales: Tensor) -> Tensor:
    """Values of E8M0 scale bytes: 2^(byte-127); 255 is NaN. Byte 0, 2^-127, is a subnormal float32.

    Args:
        scales: uint8, any shape.

    Returns:
        float32, same shape.
    """
    require_tensor("scales", scales, torch.uint8)
    bits = scales.to(torch.int32) << 23
    bits.masked_fill_(scales == 0, 0x00400000).masked_fill_(scales == 255, 0x7FC00000)
    return bits.view(torch.float32)


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8: E4M3 codes and one E8M0 scale per 32 values, the scale rounded up so that nothing overflows.

    Per block: p = fp32(amax * fp32(1/448)), rounded up to a power of two as ``cvt.rp.satfinite.ue8m0x2.f32`` (PTX ISA)
    does it, gives the byte; codes = E4M3(x * 2^(127-byte)), a product by an exact power of two. An all-zero block is
    byte 0 and codes 0, whatever the signs of its zeros. A block with a NaN or an infinity is byte 127 and all codes
    0x7F, so that the poison reaches the output instead of a finite number that looks right.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.

    Returns:
        codes uint8 [..., K] in plain k order, scales uint8 [..., K/32].
    """
    blocks = torch.unflatten(_float32("x", x, BLOCK), -1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    bits = (amax * _RCP_448).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Exponent field 0 holds the subnormals: everything up to 2^-127 (mantissa 0x400000) is byte 0, the rest 2^-126.
    round_up = torch.where(exponent == 0, mantissa > 0x400000, mantissa != 0)
    scales = (exponent + round_up).clamp_(max=E8M0_MAX).to(torch.uint8)
    codes = encode_e4m3(blocks * decode_e8m0(E8M0_MAX - scales).unsqueeze(-1))
    codes.masked_fill_((amax == 0).unsqueeze(-1), 0)
    poison = ~amax.isfinite()
    codes.masked_fill_(poison.unsqueeze(-1), E4M3_NAN)
    scales.masked_fill_(poison, E8M0_ONE)
    return codes.flatten(-2), scales


def dequantize_mxfp8(codes: Tensor, scales: Tensor) -> Tensor:
    """Values of MXFP8 data, rounded to float32 (exact unless code * scale leaves float32's range).

    Args:
        codes: uint8 [..., K], plain k order.
        scales: uint8 [..., K/32].

    Returns:
        float32 [..., K].
    """
    return _scale_blocks(decode_e4m3(codes), scales)


def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4: packed E2M1 codes and one E8M0 scale per 32 values, by OCP MX v1.0 section 6.3.

    The scale is 2^(floor(log2(amax)) - 2), at least 2^-127, so the largest value of a block lands in [4, 8) and
    saturates at 6. An all-zero block is byte 0 and codes 0.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.

    Returns:
        packed uint8 [..., K/2] (low nibble = even k), scales uint8 [..., K/32].

    Raises:
        ValueError: K not a multiple of 32, or a value that is not finite.
    """
    blocks = torch.unflatten(_float32("x", x, BLOCK), -1, (-1, BLOCK))
    if not bool(blocks.isfinite().all()):
        raise ValueError(f"x: expected finite values, got {describe(x)} with NaN or infinity")
    amax = blocks.abs().amax(-1)
    scales = ((amax.view(torch.int32) >> 23) - 2).clamp_(min=0).to(torch.uint8)
    scaled = blocks * decode_e8m0(E8M0_MAX - scales).unsqueeze(-1)
    return encode_e2m1(scaled.masked_fill_((amax == 0).unsqueeze(-1), 0.0).flatten(-2)), scales


def dequantize_mxfp4(packed: Tensor, scales: Tensor) -> Tensor:
    """Values of MXFP4 data, rounded to float32 (exact unless code * scale leaves float32's range).

    Args:
        packed: uint8 [..., K/2], low nibble = even k.
        scales: uint8 [..., K/32].

    Returns:
        float32 [..., K].
    """
    return _scale_blocks(decode_e2m1(packed), scales)


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales in the 128x4 order of cuBLAS and FlashInfer: one 512-byte tile per 128 rows and K=128.

    With nK = ceil(K/128), the scale of row r and k-block c moves to byte
    ``(r/128)*nK*512 + (c/4)*512 + (r%32)*16 + ((r%128)/32)*4 + c%4``. Rows pad to 128 and k-blocks to 4, with
    zero bytes.

    Args:
        scales: uint8 [..., N, K/32].

    Returns:
        uint8 [..., ceil(N/128), ceil(K/128), 512].
    """
    require_tensor("scales", scales, torch.uint8)
    if scales.dim() < 2:
        raise ValueError(f"scales: expected uint8 [..., N, K/32], got {describe(scales)}")
    n, c = scales.shape[-2:]
    padded = torch.nn.functional.pad(scales, (0, -c % 4, 0, -n % 128))
    # [row tile, r%128/32, r%32, k tile, c%4] -> [row tile, k tile, r%32, r%128/32, c%4]
    tiles = torch.unflatten(torch.unflatten(padded, -1, (-1, 4)), -3, (-1, 4, 32))
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-3)


def unswizzle_scales(swizzled: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `swizzle_scales`; padding is dropped.

    Args:
        swizzled: uint8 [..., ceil(n/128), ceil(k/128), 512].
        n: rows.
        k: K in values (not blocks), a multiple of 32.

    Returns:
        uint8 [..., n, k/32].
    """
    _require_multiple("k", k, BLOCK)
    require_tensor("swizzled", swizzled, torch.uint8)
    tail = [-(-n // 128), -(-k // 128), 512]
    if list(swizzled.shape[-3:]) != tail:
        raise ValueError(f"swizzled: expected uint8 [..., {', '.join(map(str, tail))}], got {describe(swizzled)}")
    tiles = torch.unflatten(swizzled, -1, (32, 4, 4)).transpose(-3, -2).movedim(-4, -2)
    return tiles.flatten(-2).flatten(-4, -2)[..., :n, : k // BLOCK].contiguous()


class WordOrder(str, Enum):
    """Order of the eight codes k = 8t .. 8t+7 inside a 32-bit word of prepared weights; a device reads one of the two.

    Each is what its GPUs expand with the fewest instructions into what their MMA takes (csrc/tile/mma_mx.cuh).
    """

    CONTAINERS = "containers"  # SM12x, and every device but SM90: nibbles in k order, the word rotated left by 2
    HALVES = "halves"  # SM90: two 16-bit halves, k = 0, 4, 1, 5 and 2, 6, 3, 7, signs above magnitudes


@functools.cache
def word_order_of(device: torch.device) -> WordOrder:
    """The order that a device's kernels read; CPU and others without kernels have that of SM12x.

    Args:
        device: with its index, as tensors have it.
    """
    if device.type == "cuda" and _wheel.served_as(torch.cuda.get_device_capability(device))[0] == 9:
        return WordOrder.HALVES
    return WordOrder.CONTAINERS


def pack_words(packed: Tensor, order: WordOrder) -> Tensor:
    """Every little-endian 32-bit word with its eight codes in the order that a kernel wants.

    CONTAINERS rotates the word left by 2 bits. A byte's low nibble (even k) then sits in bits 5..2, where mxf8f6f4 MMA
    wants an E2M1 code (PTX ISA, "mma"), and one rotation right by 4 brings the odd k there.

    HALVES puts k = 0, 4, 1, 5 into the low 16 bits and k = 2, 6, 3, 7 into the high ones, alike: with a code as
    sign s and magnitude eem, the first has s at bit 14 and eem at bits 11..9, the second 15 and 8..6, the third 12 and
    5..3, the fourth 13 and 2..0. Shifted to where the second stands, and masked, each is a bfloat16 of 2^-126 times its
    value, and three bits to the left of that a float16 of 2^-14 times it.

    Args:
        packed: uint8 [..., K/2], low nibble = even k, K/2 a multiple of 4.
        order: the order to make.

    Returns:
        uint8, same shape.
    """
    words = _words("packed", packed)
    if order is WordOrder.CONTAINERS:
        return (words << 2 | (words >> 30 & 0x3)).view(torch.uint8)
    split = torch.unflatten(words.view(torch.uint8), -1, (-1, 4))
    a, b = split[..., :2], split[..., 2:]  # of each half, k = 1, 0 and k = 5, 4 (high nibble, low nibble)
    low = (b & 0x03) << 6 | (a & 0x70) >> 1 | (b & 0x70) >> 4
    high = (b & 0x08) << 4 | (a & 0x08) << 3 | (b & 0x80) >> 2 | (a & 0x80) >> 3 | (a & 0x07) << 1 | (b & 0x04) >> 2
    return torch.stack((low, high), -1).flatten(-3)


def unpack_words(words: Tensor, order: WordOrder) -> Tensor:
    """The inverse of `pack_words`: uint8 [..., K/2] to the same."""
    made = _words("words", words)
    if order is WordOrder.CONTAINERS:
        return ((made >> 2 & 0x3FFFFFFF) | made << 30).view(torch.uint8)
    split = torch.unflatten(made.view(torch.uint8), -1, (-1, 4))
    low, high = split[..., 0::2], split[..., 1::2]
    a = (high & 0x40) >> 3 | (high & 0x10) << 3 | (high & 0x0E) >> 1 | (low & 0x38) << 1
    b = (high & 0x20) << 2 | (high & 0x80) >> 4 | (high & 0x01) << 2 | low >> 6 | (low & 0x07) << 4
    return torch.cat((a, b), -1).flatten(-2)


def weight_bytes(n: int, k: int) -> int:
    """Bytes of one expert's prepared weight [n, k], scales included (csrc/shared/weight_layout.cuh).

    Args:
        n: rows; they pad to 64.
        k: K in values, a multiple of 32.
    """
    return -(-n // WEIGHT_BLOCK_ROWS) * (-(-k // 128) * _BLOCK_SCALE_BYTES + k // BLOCK * _STEP_BYTES)


def arrange_weights(packed: Tensor, scales: Tensor, order: WordOrder) -> Tensor:
    """One expert's weight as the kernels read it: contiguous blocks of 64 rows by one K tile of 128, scales inside.

    For each K tile, the blocks of all rows (padded to 64 with zeros). A block begins with 256 bytes of scales: the word
    of row r, four k-blocks of which the padding ones are 0, at ``r/32*128 + r%8*16 + p*4`` with p = 0, 2, 1, 3 for
    r/8%4 = 0 .. 3. Then come 1024 bytes for each step of K = 32 that the tile has: the word (`pack_words`) of row r and
    k = 8t .. 8t+7 at ``r/32*512 + (r%8*4 + t)*16 + r/8%4*4``.

    Args:
        packed: uint8 [N, K/2], low nibble = even k.
        scales: uint8 [N, K/32], E8M0.
        order: of the codes inside a word.

    Returns:
        uint8 [weight_bytes(N, K)].
    """
    require_tensor("packed", packed, torch.uint8, ("N", "K/2"))
    _require_blocks("packed", packed, BLOCK // 2)
    n, k = packed.shape[0], 2 * packed.shape[1]
    weight = torch.empty(weight_bytes(n, k), dtype=torch.uint8, device=packed.device)
    write_rows(weight, n, k, 0, packed, scales, order)
    return weight


def restore_weights(weight: Tensor, n: int, k: int, order: WordOrder) -> tuple[Tensor, Tensor]:
    """The inverse of `arrange_weights`; padding is dropped.

    Args:
        weight: uint8 [weight_bytes(n, k)].
        n: rows.
        k: K in values, a multiple of 32.
        order: of the codes inside a word.

    Returns:
        packed uint8 [n, k/2], scales uint8 [n, k/32].
    """
    return read_rows(weight, n, k, slice(0, n), order)


def write_rows(weight: Tensor, n: int, k: int, first: int, packed: Tensor, scales: Tensor, order: WordOrder) -> None:
    """`arrange_weights` of some rows into the weight of all n.

    Args:
        weight: uint8 [weight_bytes(n, k)].
        first: the first row to write, a multiple of 64.
        packed, scales: as for `arrange_weights`; their number of rows is a multiple of 64, or they end at row n.
    """
    rows = packed.shape[0]
    require_tensor("packed", packed, torch.uint8, (rows, k // 2))
    require_tensor("scales", scales, torch.uint8, (rows, k // BLOCK))
    _require_multiple("first", first, WEIGHT_BLOCK_ROWS)
    if first + rows != n:
        _require_multiple("rows", rows, WEIGHT_BLOCK_ROWS)
    missing = -rows % WEIGHT_BLOCK_ROWS
    made = pack_words(packed, order)
    if missing:  # pad copies, even by nothing
        made = torch.nn.functional.pad(made, (0, 0, 0, missing))
    words = made.view(torch.int32)
    scale_words = torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4, 0, missing)).view(torch.int32)
    begin = first // WEIGHT_BLOCK_ROWS
    for tiles, steps, blocks in _weight_tiles(weight, n, k):
        part = blocks[:, begin : begin + (rows + missing) // WEIGHT_BLOCK_ROWS]
        # [block, r/32, r/16%2, r/8%2, r%8, tile] -> [tile, block, r/32, r%8, r/8%2, r/16%2]
        tile_scales = torch.unflatten(scale_words[:, tiles], 0, (-1, 2, 2, 2, 8)).permute(5, 0, 1, 4, 3, 2)
        target = part[..., :_BLOCK_SCALE_BYTES].view(torch.int32)
        torch.unflatten(target, -1, (2, 8, 2, 2)).copy_(tile_scales)
        # [block, r/32, r/8%4, r%8, tile, step, t] -> [tile, block, step, r/32, r%8, t, r/8%4]
        columns = slice(tiles.start * 16, (tiles.stop - 1) * 16 + steps * 4)
        tile_words = torch.unflatten(torch.unflatten(words[:, columns], 1, (-1, steps, 4)), 0, (-1, 2, 4, 8))
        target = part[..., _BLOCK_SCALE_BYTES:].view(torch.int32)
        torch.unflatten(target, -1, (steps, 2, 8, 4, 4)).copy_(tile_words.permute(4, 0, 5, 1, 3, 6, 2))


def read_rows(weight: Tensor, n: int, k: int, rows: slice, order: WordOrder) -> tuple[Tensor, Tensor]:
    """`restore_weights` of some rows.

    Args:
        rows: begin and end; begin is a multiple of 64.

    Returns:
        packed uint8 [rows, k/2], scales uint8 [rows, k/32].
    """
    _require_multiple("first row", rows.start, WEIGHT_BLOCK_ROWS)
    count = rows.stop - rows.start
    begin, end = rows.start // WEIGHT_BLOCK_ROWS, -(-rows.stop // WEIGHT_BLOCK_ROWS)
    words, scale_words = [], []
    for _, steps, blocks in _weight_tiles(weight, n, k):
        part = blocks[:, begin:end].contiguous()
        tile_scales = part[..., :_BLOCK_SCALE_BYTES].contiguous().view(torch.int32)
        tile_scales = torch.unflatten(tile_scales, -1, (2, 8, 2, 2)).permute(1, 2, 5, 4, 3, 0)
        scale_words.append(tile_scales.reshape((end - begin) * WEIGHT_BLOCK_ROWS, -1))
        tile_words = part[..., _BLOCK_SCALE_BYTES:].contiguous().view(torch.int32)
        tile_words = torch.unflatten(tile_words, -1, (steps, 2, 8, 4, 4)).permute(1, 3, 6, 4, 0, 2, 5)
        words.append(tile_words.reshape((end - begin) * WEIGHT_BLOCK_ROWS, -1))
    packed = unpack_words(torch.cat(words, 1).view(torch.uint8)[:count], order)
    return packed, torch.cat(scale_words, 1).view(torch.uint8)[:count, : k // BLOCK].contiguous()


def reorder_words(weight: Tensor, n: int, k: int, old: WordOrder, new: WordOrder) -> Tensor:
    """One expert's prepared weight with the codes of its words in another order.

    Args:
        weight: uint8 [weight_bytes(n, k)] in the old order.

    Returns:
        uint8 [weight_bytes(n, k)], a copy.
    """
    result = weight.clone()
    for _, _, blocks in _weight_tiles(result, n, k):
        words = blocks[..., _BLOCK_SCALE_BYTES:]
        words.copy_(pack_words(unpack_words(words, old), new))
    return result


def _weight_tiles(weight: Tensor, n: int, k: int) -> Iterator[tuple[slice, int, Tensor]]:
    """The K tiles of a prepared weight, equally long ones together: (which, their steps, [tiles, blocks, bytes])."""
    _require_multiple("k", k, BLOCK)
    require_tensor("weight", weight, torch.uint8, (weight_bytes(n, k),))
    blocks, whole, rest = -(-n // WEIGHT_BLOCK_ROWS), k // 128, k % 128 // BLOCK
    size = _BLOCK_SCALE_BYTES + 4 * _STEP_BYTES
    if whole:
        yield slice(0, whole), 4, weight[: whole * blocks * size].view(whole, blocks, size)
    if rest:
        tail = weight[whole * blocks * size :].view(1, blocks, _BLOCK_SCALE_BYTES + rest * _STEP_BYTES)
        yield slice(whole, whole + 1), rest, tail


def interleave_k(codes: Tensor) -> Tensor:
    """Each block of 32 stored as its 16 even k, then its 16 odd k: the kernel's order of the activations.

    Args:
        codes: [..., K], any dtype, K a multiple of 32.

    Returns:
        Same shape and dtype; position s < 16 of a block holds its k=2s, position 16+s its k=2s+1.
    """
    _require_blocks("codes", codes, BLOCK)
    return torch.unflatten(codes, -1, (-1, 16, 2)).transpose(-1, -2).flatten(-3)


def deinterleave_k(codes: Tensor) -> Tensor:
    """The inverse of `interleave_k`."""
    _require_blocks("codes", codes, BLOCK)
    return torch.unflatten(codes, -1, (-1, 2, 16)).transpose(-1, -2).flatten(-3)


def fold_activations(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8 rows as the kernels of SM90 that take no scales read them: csrc/shared/folded.cuh.

    Args:
        codes: uint8 [R, K] E4M3 in plain order.
        scales: uint8 [R, K/32] E8M0, at most 248.

    Returns:
        bfloat16 [R, K], each value times its scale and 2^90, exactly, and int32 [1]: whether any block is far. Blocks
        with scales below byte 47 are stored times 2^190, those above 156 times 2^-10, and are far unless all zeros. In
        each block of 32, k = 8 t + c stands at 16 (c % 2) + 8 (c // 4) + 2 t + c // 2 % 2.
    """
    require_tensor("scales", scales, torch.uint8, ("R", "K/32"))
    values = decode_e4m3(codes).double()
    low, high = scales < 47, scales > 156
    shifts = 90 + 100 * (low.double() - high.double())
    exponents = torch.repeat_interleave(scales.double() - 127 + shifts, BLOCK, dim=-1)
    folded = (values * exponents.exp2()).to(torch.bfloat16)
    is_far = (low | high) & (torch.unflatten(codes & 0x7F, -1, (-1, BLOCK)) != 0).any(-1)
    # [..., t, c // 4, c // 2 % 2, c % 2] to [..., c % 2, c // 4, t, c // 2 % 2]
    ordered = torch.unflatten(folded, -1, (-1, 4, 2, 2, 2)).permute(0, 1, 5, 3, 2, 4).flatten(1)
    return ordered, is_far.any().int().reshape(1)


def pack_row_scales(scales: Tensor) -> Tensor:
    """Activation scales as the kernel reads them: one 32-bit word holds a row's four scales of K=128.

    Args:
        scales: uint8 [R, K/32].

    Returns:
        uint8 [ceil(K/128), R4, 4], R4 = R rounded up to 4; byte b of word (kt, row) is k-block 4*kt+b; padding is zero.
    """
    require_tensor("scales", scales, torch.uint8, ("R", "K/32"))
    rows, c = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -c % 4, 0, -rows % 4))
    return torch.unflatten(padded, -1, (-1, 4)).transpose(0, 1).contiguous()


def unpack_row_scales(packed: Tensor, rows: int, k: int) -> Tensor:
    """The inverse of `pack_row_scales`; padding is dropped.

    Args:
        packed: uint8 [ceil(k/128), rows rounded up to 4, 4].
        rows: rows to return.
        k: K in values (not blocks), a multiple of 32.

    Returns:
        uint8 [rows, k/32].
    """
    _require_multiple("k", k, BLOCK)
    require_tensor("packed", packed, torch.uint8, (-(-k // 128), -(-rows // 4) * 4, 4))
    return packed.transpose(0, 1).flatten(1)[:rows, : k // BLOCK].contiguous()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_multiple(name: str, value: int, multiple: int) -> None:
    if value < 0 or value % multiple:
        raise ValueError(f"{name}: expected a multiple of {multiple}, got {value}")


def _require_blocks(name: str, tensor: Tensor, multiple: int) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] % multiple:
        raise ValueError(f"{name}: expected a last dimension that is a multiple of {multiple}, got {describe(tensor)}")


def _float32(name: str, x: Tensor, multiple: int) -> Tensor:
    require_tensor(name, x, _FLOATS)
    if multiple > 1:
        _require_blocks(name, x, multiple)
    return x.to(torch.float32)


def _words(name: str, packed: Tensor) -> Tensor:
    """uint8 [..., 4 n] as int32 [..., n]: little-endian words."""
    require_tensor(name, packed, torch.uint8)
    _require_blocks(name, packed, 4)
    packed = packed.contiguous()
    return (packed.clone() if packed.storage_offset() % 4 else packed).view(torch.int32)


def _scale_blocks(values: Tensor, scales: Tensor) -> Tensor:
    _require_blocks("values", values, BLOCK)
    require_tensor("scales", scales, torch.uint8, [*values.shape[:-1], values.shape[-1] // BLOCK])
    return (torch.unflatten(values, -1, (-1, BLOCK)) * decode_e8m0(scales).unsqueeze(-1)).flatten(-2)
