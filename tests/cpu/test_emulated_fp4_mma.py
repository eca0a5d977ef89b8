"""The stand-in for SM12x's MMAs of FP4 by FP4 (csrc/tile/sm12x/emulated_fp4_mma.cuh), as test_emulated_mma.py.

Expected values are `arithmetic.fp4_mma`'s, which test_fp4_arithmetic.py holds against mmasim, of all the kinds of
operands there. Which element is in which register is written here once more, from the PTX ISA's pictures of m16n8k64.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy
import pytest
import torch
from fp4_draws import KINDS, assert_same, every_kind, is_nvfp4
from torch import Tensor

from mxfp4_moe.arithmetic import SM12X_MXF4, SM12X_NVF4, Arithmetic, fp4_mma

LANE = torch.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4
both_rules = pytest.mark.parametrize("rule", [SM12X_MXF4, SM12X_NVF4], ids=lambda rule: rule.operands)


def words(codes: Tensor, per_word: int) -> Tensor:
    """uint8 [..., K], 8 nibbles or 4 bytes to a 32-bit word, the first one lowest: int64 [..., K / per_word]."""
    bits = 32 // per_word
    parts = torch.unflatten(codes.long(), -1, (-1, per_word))
    return (parts << (bits * torch.arange(per_word))).sum(-1)


def warps_of(x: Tensor, rows: int) -> Tensor:
    return x.view(-1, rows, x.shape[-1])


def registers(given: Sequence[Tensor], byte: int = 0) -> Tensor:
    """int64 [W, 12, 32] of codes and scales of A [M] and of B [N] and C [M, N]: a warp for each 16 x 8 of them.

    byte: where in its word an E8M0 row's first scale is; the other half has scales that must not be read.
    """
    a, b, a_scales, b_scales, c = given
    words_a, words_b = words(warps_of(a, 16), 8), words(warps_of(b, 8), 8)
    count_a, count_b = len(words_a), len(words_b)

    def scale_words(scales: Tensor, rows: int) -> Tensor:
        if scales.shape[1] == 2:
            halves = [scales, torch.full_like(scales, 0x55)]
            scales = torch.cat(halves if byte == 0 else halves[::-1], 1)
        return words(warps_of(scales, rows), 4)[..., 0]

    scale_a, scale_b = scale_words(a_scales, 16), scale_words(b_scales, 8)
    unused = torch.randint(0, 1 << 32, (32,), generator=torch.Generator().manual_seed(1))
    from_a = torch.where(QUAD < 2, scale_a[:, GROUP + 8 * (QUAD % 2)], unused)
    from_b = torch.where(QUAD == 0, scale_b[:, GROUP], unused)
    bits = c.view(torch.int32).long().view(count_a, 16, count_b, 8).transpose(1, 2)

    def each(x: Tensor, of_a: bool) -> Tensor:  # of every warp's row block, or column block
        x = x.unsqueeze(1 if of_a else 0).expand(count_a, count_b, 32)
        return x.reshape(-1, 32)

    return torch.stack(
        [
            *(each(words_a[:, GROUP + 8 * (reg % 2), QUAD + 4 * (reg // 2)], True) for reg in range(4)),
            *(each(words_b[:, GROUP, QUAD + 4 * reg], False) for reg in range(2)),
            *(each(from_a, True), each(from_b, False)),
            *(bits[:, :, GROUP + 8 * (reg // 2), QUAD * 2 + reg % 2].reshape(-1, 32) for reg in range(4)),
        ],
        1,
    )


def run(host: ModuleType, of_warps: Tensor, rule: Arithmetic, byte: int, shape: torch.Size) -> Tensor:
    """float32 [M, N] of `registers`."""
    given = (of_warps & 0xFFFFFFFF).numpy().astype(numpy.uint32)
    lanes = torch.from_numpy(host.emulated_fp4_mma(given, is_nvfp4(rule), byte).astype(numpy.int64))
    out = torch.full((len(lanes), 16, 8), -1)
    for reg in range(4):
        out[:, GROUP + 8 * (reg // 2), QUAD * 2 + reg % 2] = lanes[:, reg]
    assert not (out < 0).any()
    m, n = shape
    whole = out.view(m // 16, n // 8, 16, 8).transpose(1, 2).reshape(m, n)
    return whole.to(torch.int32).view(torch.float32)


@both_rules
@pytest.mark.parametrize("kind", KINDS)
def test_emulation_is_the_rule(host: ModuleType, rule: Arithmetic, kind: str) -> None:
    draw = every_kind(rule)[kind]
    for byte in (0,) if is_nvfp4(rule) else (0, 2):
        given = draw()
        out = run(host, registers(given, byte), rule, byte, given[-1].shape)
        assert_same(out, fp4_mma(*given, arithmetic=rule))
        assert len(out.unique()) > 1


@both_rules
@pytest.mark.parametrize("mistake", ["register", "half of K", "lane", "scale lane", "rows", "byte", "kind"])
def test_a_mistake_is_seen(host: ModuleType, mistake: str, rule: Arithmetic) -> None:
    """The comparison fails where an operand is in the wrong place."""
    given = every_kind(rule)["usual"]()
    right = registers(given)
    wrong, byte, taken = right.clone(), 0, rule
    if mistake == "register":
        wrong[:, [0, 1]] = right[:, [1, 0]]
    elif mistake == "half of K":
        wrong[:, [4, 5]] = right[:, [5, 4]]
    elif mistake == "lane":
        wrong[:, 4, [4, 6]] = right[:, 4, [6, 4]]
    elif mistake == "scale lane":
        wrong[:, 6, 0::4], wrong[:, 6, 1::4] = right[:, 6, 1::4], right[:, 6, 0::4]
    elif mistake == "rows":
        wrong[:, [8, 9]] = right[:, [10, 11]]
    elif mistake == "byte":
        byte = 2
    else:
        taken = SM12X_MXF4 if is_nvfp4(rule) else SM12X_NVF4
    out = run(host, wrong, taken, byte, given[-1].shape)
    assert not torch.equal(out, run(host, right, rule, 0, given[-1].shape))
