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

WEIGHT_BLOCK_ROWS = 64  # rows of a block of prepared weights; csrc/shared/weight_layout.cuh
_BLOCK_SCALE_BYTES = WEIGHT_BLOCK_ROWS * 4
_STEP_BYTES = WEIGHT_BLOCK_ROWS * 16


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
    if device.type == "cuda" and wheel.served_as(torch.cuda.get_device_capability(device))[0] == 9:
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
    require_count("n", n)
    require_multiple("k", k, BLOCK)
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
    require_blocks("packed", packed, BLOCK // 2)
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
    require_count("n", n)
    require_multiple("k", k, BLOCK)
    require_tensor("packed", packed, torch.uint8, ("rows", k // 2))
    rows = packed.shape[0]
    require_tensor("scales", scales, torch.uint8, (rows, k // BLOCK), packed.device)
    require_multiple("first", first, WEIGHT_BLOCK_ROWS)
    if first + rows != n:
        require_multiple("rows", rows, WEIGHT_BLOCK_ROWS)
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
    require_count("n", n)
    if not isinstance(rows, slice):
        raise TypeError(f"rows: expected a slice, got {rows!r}")
    require_multiple("first row", rows.start, WEIGHT_BLOCK_ROWS)
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
    require_tensor("weight", weight, torch.uint8, (weight_bytes(n, k),))
    result = weight.clone()
    for _, _, blocks in _weight_tiles(result, n, k):
        words = blocks[..., _BLOCK_SCALE_BYTES:]
        words.copy_(pack_words(unpack_words(words, old), new))
    return result


def _weight_tiles(weight: Tensor, n: int, k: int) -> Iterator[tuple[slice, int, Tensor]]:
    """The K tiles of a prepared weight, equally long ones together: (which, their steps, [tiles, blocks, bytes])."""
    require_multiple("k", k, BLOCK)
    require_tensor("weight", weight, torch.uint8, (weight_bytes(n, k),))
    blocks, whole, rest = -(-n // WEIGHT_BLOCK_ROWS), k // 128, k % 128 // BLOCK
    size = _BLOCK_SCALE_BYTES + 4 * _STEP_BYTES
    if whole:
        yield slice(0, whole), 4, weight[: whole * blocks * size].view(whole, blocks, size)
    if rest:
        tail = weight[whole * blocks * size :].view(1, blocks, _BLOCK_SCALE_BYTES + rest * _STEP_BYTES)
        yield slice(whole, whole + 1), rest, tail


def _words(name: str, packed: Tensor) -> Tensor:
    """uint8 [..., 4 n] as int32 [..., n]: little-endian words."""
    require_tensor(name, packed, torch.uint8)
    require_blocks(name, packed, 4)
    packed = packed.contiguous()
    return (packed.clone() if packed.storage_offset() % 4 else packed).view(torch.int32)
