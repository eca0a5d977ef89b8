"""The layout of prepared weights: contiguous blocks that a tile loads, words in the order that a device expands.

csrc's weight_layout.cuh has the same; tests compare the two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor

from .._arguments import require_blocks, require_count, require_multiple, require_tensor
from .._install import wheel
from .numbers import BLOCK

# What the two GEMMs of a call read, in the order of csrc/moe/kernels.h, ActivationFormat; which of them a device has is
# `activation_formats`'s to say.
ACTIVATION_NAMES = ("mxfp8", "bf16", "mxfp4", "nvfp4", "fp16")
ACTIVATIONS_IN_WORDS = f"{', '.join(map(repr, ACTIVATION_NAMES[:-1]))} or {ACTIVATION_NAMES[-1]!r}"

WEIGHT_BLOCK_ROWS = 64  # rows of a block of prepared weights; csrc/shared/weight_layout.cuh
MXFP4_SCALE_WORDS, NVFP4_SCALE_WORDS = 1, 2  # words of scales that a row has in a K tile: of blocks of 32 or of 16
_SCALE_SET_BYTES = WEIGHT_BLOCK_ROWS * 4
_STEP_BYTES = WEIGHT_BLOCK_ROWS * 16


class WordOrder(str, Enum):
    """Which eight codes of a row's block of 32 share a 32-bit word of prepared weights, and where in it they stand.

    A kernel reads one of the three: what its GPU expands with the fewest instructions into what its MMA takes.
    """

    CONTAINERS = "containers"  # SM12x's MMA of MXFP8, and devices without kernels: k = 8t .. 8t+7, rotated left by 2
    PAIRS = "pairs"  # MMAs of bf16 and fp16 (SM90's, SM12x's of such activations): four pairs of neighbours, one a half
    PLAIN = "plain"  # SM12x's MMAs of FP4 alone, which take codes as they come: k = 8t .. 8t+7

    def __reduce_ex__(self, protocol: object) -> tuple[type[WordOrder], tuple[str]]:
        """By its value in every Python: 3.11.2 pickles the name, 3.11.7 the value."""
        return WordOrder, (self.value,)

    @classmethod
    def _missing_(cls, value: object) -> WordOrder:
        if value == "halves":  # what SM90's kernels read once: other bits in tensors of the same sizes
            raise ValueError(
                "word order: expected 'containers', 'pairs' or 'plain', got 'halves', which SM90's kernels read no "
                "longer; prepare the weights from their checkpoint again"
            )
        raise ValueError(f"word order: expected 'containers', 'pairs' or 'plain', got {value!r}")


_ORDERS_OF_SM12X = {
    "mxfp8": WordOrder.CONTAINERS,
    "bf16": WordOrder.PAIRS,
    "mxfp4": WordOrder.PLAIN,
    "nvfp4": WordOrder.PLAIN,
    "fp16": WordOrder.PAIRS,
}


def word_order_of(device: torch.device, activation_format: str = "mxfp8") -> WordOrder:
    """The order that a device's kernels read; CPU and others without kernels have that of SM12x for MXFP8.

    Args:
        device: with its index, as tensors have it.
        activation_format: of the calls (`fused_moe`): on SM12x "mxfp8", "bf16" and FP4 have kernels of their own, which
            read their own orders, of MXFP4 and NVFP4 weights alike; "fp16" has that of "bf16". SM90's read one order.

    Raises:
        TypeError, ValueError: no name of a format.
    """
    if not isinstance(activation_format, str):
        raise TypeError(f"activation_format: expected a name such as 'bf16', got {activation_format!r}")
    if activation_format not in ACTIVATION_NAMES:
        raise ValueError(f"activation_format: expected {ACTIVATIONS_IN_WORDS}, got {activation_format!r}")
    return _order_of(device, activation_format)


@functools.cache
def _order_of(device: torch.device, activation_format: str) -> WordOrder:
    if device.type != "cuda":
        return WordOrder.CONTAINERS
    family = wheel.served_as(torch.cuda.get_device_capability(device))[0]
    if family == 9:
        return WordOrder.PAIRS
    return _ORDERS_OF_SM12X[activation_format] if family == 12 else WordOrder.CONTAINERS


def pack_words(packed: Tensor, order: WordOrder) -> Tensor:
    """The bytes of every block of 32 values as four little-endian 32-bit words t = 0 .. 3, as a kernel wants them.

    CONTAINERS: word t has k = 8t .. 8t+7, nibbles in k order, rotated left by 2 bits. A byte's low nibble (even k) then
    sits in bits 5..2, where mxf8f6f4 MMA wants an E2M1 code (PTX ISA, "mma"), and one rotation right by 4 brings the
    odd k there.

    PAIRS: word t has the pairs k = 2t, 2t + 8, 2t + 16 and 2t + 24 with the k after each: those that lane t of a quad
    holds of two bf16 MMAs of 16 k (PTX ISA, "mma.m16n8k16"). The even k of a pair stands in the low 16 bits, the odd
    one in the high ones, alike: with a code as sign s and magnitude eem, the first has s at bit 15 and eem at bits
    8..6; the second s at 11 and eem at 4..2; the third eem at 14..12; the fourth ee at 10..9 and m at 0. The signs of
    the third and fourth stand in the *other* half, at bits 5 and 1. So each pair is one shift or rotation away from
    bfloat16 numbers of 2^-126 times the values, but for the fourth's m (csrc/tile/bf16/bf16_weights.cuh).

    PLAIN: word t has k = 8t .. 8t+7, nibbles in k order, which is how the bytes come.

    Args:
        packed: uint8 [..., K/2], low nibble = even k, K a multiple of 32.
        order: the order to make.

    Returns:
        uint8, same shape.
    """
    require_tensor("packed", packed, torch.uint8)
    require_blocks("packed", packed, BLOCK // 2)
    if order is WordOrder.PLAIN:
        return packed.clone(memory_format=torch.contiguous_format)
    if order is WordOrder.CONTAINERS:
        words = _words(packed)
        return (words << 2 | (words >> 30 & 0x3)).view(torch.uint8)
    # [pair, t]; a byte has the pair's even k in its low nibble.
    a, b, c, d = torch.unflatten(packed, -1, (-1, 4, 4)).unbind(-2)
    halves = []
    for h in range(2):
        x, y = (a, b, c, d) if h == 0 else (a >> 4, b >> 4, c >> 4, d >> 4), (c >> 4, d >> 4) if h == 0 else (c, d)
        halves.append((x[0] & 3) << 6 | (y[0] & 8) << 2 | (x[1] & 7) << 2 | (y[1] & 8) >> 2 | x[3] & 1)
        halves.append((x[0] & 8) << 4 | (x[2] & 7) << 4 | x[1] & 8 | x[3] & 6 | (x[0] & 4) >> 2)
    return torch.stack(halves, -1).flatten(-3)


def unpack_words(words: Tensor, order: WordOrder) -> Tensor:
    """The inverse of `pack_words`: uint8 [..., K/2] to the same."""
    require_tensor("words", words, torch.uint8)
    require_blocks("words", words, BLOCK // 2)
    if order is WordOrder.PLAIN:
        return words.clone(memory_format=torch.contiguous_format)
    if order is WordOrder.CONTAINERS:
        made = _words(words)
        return ((made >> 2 & 0x3FFFFFFF) | made << 30).view(torch.uint8)
    low0, high0, low1, high1 = torch.unflatten(words, -1, (-1, 4, 4)).unbind(-1)

    def codes(low: Tensor, high: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """Of one half and the other's low byte, the four codes."""
        return (
            high >> 4 & 8 | (high & 1) << 2 | low >> 6,
            high & 8 | low >> 2 & 7,
            other >> 2 & 8 | high >> 4 & 7,
            (other & 2) << 2 | high & 6 | low & 1,
        )

    pairs = zip(codes(low0, high0, low1), codes(low1, high1, low0), strict=True)
    return torch.stack([even | odd << 4 for even, odd in pairs], -2).flatten(-3)


def weight_bytes(n: int, k: int, scale_words: int = MXFP4_SCALE_WORDS) -> int:
    """Bytes of one expert's prepared weight [n, k], scales included (csrc/shared/weight_layout.cuh).

    Args:
        n: rows; they pad to 64.
        k: K in values, a multiple of 32.
        scale_words: of a row in a K tile of 128: 1 of MXFP4, 2 of NVFP4.
    """
    require_count("n", n)
    require_multiple("k", k, BLOCK)
    scale_bytes = _scale_words(scale_words) * _SCALE_SET_BYTES
    return -(-n // WEIGHT_BLOCK_ROWS) * (-(-k // 128) * scale_bytes + k // BLOCK * _STEP_BYTES)


def arrange_weights(packed: Tensor, scales: Tensor, order: WordOrder, scale_words: int = MXFP4_SCALE_WORDS) -> Tensor:
    """One expert's weight as the kernels read it: contiguous blocks of 64 rows by one K tile of 128, scales inside.

    For each K tile, the blocks of all rows (padded to 64 with zeros). A block begins with 256 bytes of scales: the word
    of row r, four k-blocks of which the padding ones are 0, at ``r/32*128 + r%8*16 + p*4`` with p = 0, 2, 1, 3 for
    r/8%4 = 0 .. 3. NVFP4's blocks begin with two such sets, of four blocks of 16 each: k = 0 .. 63 of the tile, and 64
    .. 127. Then come 1024 bytes for each step of K = 32 that the tile has: word t (`pack_words`) of row r at
    ``r/32*512 + (r%8*4 + t)*16 + r/8%4*4``.

    Args:
        packed: uint8 [N, K/2], low nibble = even k.
        scales: uint8 [N, K/32], E8M0; of NVFP4 [N, K/16], E4M3.
        order: of the codes in words.
        scale_words: 1 of MXFP4, 2 of NVFP4.

    Returns:
        uint8 [weight_bytes(N, K, scale_words)].
    """
    require_tensor("packed", packed, torch.uint8, ("N", "K/2"))
    require_blocks("packed", packed, BLOCK // 2)
    n, k = packed.shape[0], 2 * packed.shape[1]
    weight = torch.empty(weight_bytes(n, k, scale_words), dtype=torch.uint8, device=packed.device)
    write_rows(weight, n, k, 0, packed, scales, order, scale_words)
    return weight


def restore_weights(
    weight: Tensor, n: int, k: int, order: WordOrder, scale_words: int = MXFP4_SCALE_WORDS
) -> tuple[Tensor, Tensor]:
    """The inverse of `arrange_weights`; padding is dropped.

    Args:
        weight: uint8 [weight_bytes(n, k, scale_words)].
        n: rows.
        k: K in values, a multiple of 32.
        order: of the codes in words.
        scale_words: 1 of MXFP4, 2 of NVFP4.

    Returns:
        packed uint8 [n, k/2], scales uint8 [n, k/32]; of NVFP4 [n, k/16].
    """
    return read_rows(weight, n, k, slice(0, n), order, scale_words)


def write_rows(
    weight: Tensor,
    n: int,
    k: int,
    first: int,
    packed: Tensor,
    scales: Tensor,
    order: WordOrder,
    scale_words: int = MXFP4_SCALE_WORDS,
) -> None:
    """`arrange_weights` of some rows into the weight of all n.

    Args:
        weight: uint8 [weight_bytes(n, k, scale_words)].
        first: the first row to write, a multiple of 64.
        packed, scales: as for `arrange_weights`; their number of rows is a multiple of 64, or they end at row n.
    """
    require_count("n", n)
    require_multiple("k", k, BLOCK)
    require_tensor("packed", packed, torch.uint8, ("rows", k // 2))
    rows = packed.shape[0]
    require_tensor("scales", scales, torch.uint8, (rows, k // BLOCK * _scale_words(scale_words)), packed.device)
    require_multiple("first", first, WEIGHT_BLOCK_ROWS)
    if first + rows != n:
        require_multiple("rows", rows, WEIGHT_BLOCK_ROWS)
    missing = -rows % WEIGHT_BLOCK_ROWS
    made = pack_words(packed, order)
    if missing:  # pad copies, even by nothing
        made = torch.nn.functional.pad(made, (0, 0, 0, missing))
    words = made.view(torch.int32)
    of_tiles = torch.nn.functional.pad(scales, (0, -scales.shape[1] % (4 * scale_words), 0, missing)).view(torch.int32)
    begin, scale_bytes = first // WEIGHT_BLOCK_ROWS, scale_words * _SCALE_SET_BYTES
    for tiles, steps, blocks in _weight_tiles(weight, n, k, scale_words):
        part = blocks[:, begin : begin + (rows + missing) // WEIGHT_BLOCK_ROWS]
        # [block, r/32, r/16%2, r/8%2, r%8, tile, set] -> [tile, block, set, r/32, r%8, r/8%2, r/16%2]
        tile_scales = of_tiles[:, tiles.start * scale_words : tiles.stop * scale_words]
        tile_scales = torch.unflatten(torch.unflatten(tile_scales, 1, (-1, scale_words)), 0, (-1, 2, 2, 2, 8))
        target = part[..., :scale_bytes].view(torch.int32)
        torch.unflatten(target, -1, (scale_words, 2, 8, 2, 2)).copy_(tile_scales.permute(5, 0, 6, 1, 4, 3, 2))
        # [block, r/32, r/8%4, r%8, tile, step, t] -> [tile, block, step, r/32, r%8, t, r/8%4]
        columns = slice(tiles.start * 16, (tiles.stop - 1) * 16 + steps * 4)
        tile_words = torch.unflatten(torch.unflatten(words[:, columns], 1, (-1, steps, 4)), 0, (-1, 2, 4, 8))
        target = part[..., scale_bytes:].view(torch.int32)
        torch.unflatten(target, -1, (steps, 2, 8, 4, 4)).copy_(tile_words.permute(4, 0, 5, 1, 3, 6, 2))


def read_rows(
    weight: Tensor, n: int, k: int, rows: slice, order: WordOrder, scale_words: int = MXFP4_SCALE_WORDS
) -> tuple[Tensor, Tensor]:
    """`restore_weights` of some rows.

    Args:
        rows: begin and end; begin is a multiple of 64.

    Returns:
        packed uint8 [rows, k/2], scales uint8 [rows, k/32]; of NVFP4 [rows, k/16].
    """
    require_count("n", n)
    if not isinstance(rows, slice):
        raise TypeError(f"rows: expected a slice, got {rows!r}")
    require_multiple("first row", rows.start, WEIGHT_BLOCK_ROWS)
    count, scale_bytes = rows.stop - rows.start, _scale_words(scale_words) * _SCALE_SET_BYTES
    begin, end = rows.start // WEIGHT_BLOCK_ROWS, -(-rows.stop // WEIGHT_BLOCK_ROWS)
    words, of_tiles = [], []
    for _, steps, blocks in _weight_tiles(weight, n, k, scale_words):
        part = blocks[:, begin:end].contiguous()
        tile_scales = part[..., :scale_bytes].contiguous().view(torch.int32)
        tile_scales = torch.unflatten(tile_scales, -1, (scale_words, 2, 8, 2, 2)).permute(1, 3, 6, 5, 4, 0, 2)
        of_tiles.append(tile_scales.reshape((end - begin) * WEIGHT_BLOCK_ROWS, -1))
        tile_words = part[..., scale_bytes:].contiguous().view(torch.int32)
        tile_words = torch.unflatten(tile_words, -1, (steps, 2, 8, 4, 4)).permute(1, 3, 6, 4, 0, 2, 5)
        words.append(tile_words.reshape((end - begin) * WEIGHT_BLOCK_ROWS, -1))
    packed = unpack_words(torch.cat(words, 1).view(torch.uint8)[:count], order)
    columns = k // BLOCK * scale_words
    return packed, torch.cat(of_tiles, 1).view(torch.uint8)[:count, :columns].contiguous()


def reorder_words(
    weight: Tensor, n: int, k: int, old: WordOrder, new: WordOrder, scale_words: int = MXFP4_SCALE_WORDS
) -> Tensor:
    """One expert's prepared weight with the codes of its words in another order.

    Args:
        weight: uint8 [weight_bytes(n, k, scale_words)] in the old order.

    Returns:
        uint8 [weight_bytes(n, k, scale_words)], a copy.
    """
    return arrange_weights(*restore_weights(weight, n, k, old, scale_words), new, scale_words)


def _scale_words(scale_words: int) -> int:
    if scale_words not in (MXFP4_SCALE_WORDS, NVFP4_SCALE_WORDS):
        raise ValueError(f"scale_words: expected 1 of MXFP4 or 2 of NVFP4, got {scale_words!r}")
    return scale_words


def _weight_tiles(weight: Tensor, n: int, k: int, scale_words: int) -> Iterator[tuple[slice, int, Tensor]]:
    """The K tiles of a prepared weight, equally long ones together: (which, their steps, [tiles, blocks, bytes])."""
    require_multiple("k", k, BLOCK)
    require_tensor("weight", weight, torch.uint8, (weight_bytes(n, k, scale_words),))
    blocks, whole, rest = -(-n // WEIGHT_BLOCK_ROWS), k // 128, k % 128 // BLOCK
    scale_bytes = scale_words * _SCALE_SET_BYTES
    size = scale_bytes + 4 * _STEP_BYTES
    if whole:
        yield slice(0, whole), 4, weight[: whole * blocks * size].view(whole, blocks, size)
    if rest:
        tail = weight[whole * blocks * size :].view(1, blocks, scale_bytes + rest * _STEP_BYTES)
        yield slice(whole, whole + 1), rest, tail


def _words(packed: Tensor) -> Tensor:
    """uint8 [..., 4 n] as int32 [..., n]: little-endian words."""
    packed = packed.contiguous()
    return (packed.clone() if packed.storage_offset() % 4 else packed).view(torch.int32)
