"""NVFP4 weights under bf16 activations on a GPU: SM90's kernels and SM12x's, in a wheel of profile `full`.

SM90's tiles of 32 activation rows and more are wgmma's, which nothing executes but a GPU. On one without these kernels
there is nothing to ask, and each test says so.
"""

from __future__ import annotations

from itertools import pairwise

import gpu_problems
import nvfp4_cases
import pytest
import torch
from gpu_cases import require_pair
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats, reference
from mxfp4_moe._call.activation_format import tiles_of
from mxfp4_moe._install import loading, wheel
from mxfp4_moe.arithmetic import Arithmetic, gemm, of_arch
from mxfp4_moe.problems import ROWS_OF_NO_EXPERT, ROWS_PER_EXPERT, bits, offsets_of, random_call, relative_error
from mxfp4_moe.tiles import NVFP4_BF16, Tile
from mxfp4_moe.weights import MoEWeights

NVFP4, BF16 = 1, 1  # csrc/tile_abi.h, of weights and of rows
TOLERANCE = 5e-3  # what is left is the last bits of exp and of sums
SCALES = 127  # numbers of E4M3 without a sign


@pytest.fixture(autouse=True)
def device() -> torch.device:
    require_pair(NVFP4_BF16)
    return gpu_problems.gpu()


def rule_of(device: torch.device) -> Arithmetic:
    arch = wheel.arch_for(torch.cuda.get_device_capability(device))
    assert arch is not None
    return of_arch(arch, NVFP4_BF16)


def tiles_here(device: torch.device) -> tuple[Tile, ...]:
    return tiles_of("bf16", device.index, formats.WeightFormat.NVFP4)


class Problem:
    """Any codes under any scales, rows of many magnitudes, factors of gates and ups for each expert."""

    def __init__(
        self, k: int, n: int, device: torch.device, rows_per_expert: tuple[int, ...] = ROWS_PER_EXPERT
    ) -> None:
        g = torch.Generator().manual_seed(1000 * k + n)
        experts = len(rows_per_expert)
        count = sum(rows_per_expert) + ROWS_OF_NO_EXPERT
        magnitudes = torch.randint(-20, 21, (count, k // 16, 1), generator=g).float().exp2()
        rows = (torch.randn(count, k // 16, 16, generator=g) * magnitudes).flatten(1).bfloat16()
        packed = torch.randint(0, 256, (experts, n, k // 2), generator=g).to(torch.uint8)
        scales = torch.randint(0, SCALES, (experts, n, k // 16), generator=g).to(torch.uint8)
        factors = 0.01 * (0.5 + torch.rand(experts, 2, generator=g))
        self.rows, self.packed, self.scales, self.factors = (x.to(device) for x in (rows, packed, scales, factors))
        self.offsets = offsets_of(rows_per_expert, device)
        self.weight = torch.stack(
            [
                formats.arrange_weights(codes, of_blocks, formats.WordOrder.PAIRS, 2)
                for codes, of_blocks in zip(self.packed, self.scales, strict=True)
            ]
        )

    def expected(self, rule: Arithmetic) -> Tensor:
        out = torch.full((len(self.rows), self.packed.shape[1]), float("nan"), device=self.rows.device)
        part = torch.arange(out.shape[1], device=out.device) % 16 // 8
        for e, (begin, end) in enumerate(pairwise(self.offsets.tolist())):
            if end > begin:
                rows = slice(begin, end)
                weights = (self.packed[e], self.scales[e])
                gemm(rule, self.rows[rows], None, *weights, out[rows], pair=NVFP4_BF16, factor=self.factors[e, part])
        return out

    def run(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        """In an output of NaN, of which the rows of no expert must stay."""
        m_tiles = reference.m_tiles(self.offsets, tile.m)
        out = torch.full((len(self.rows), self.packed.shape[1]), float("nan"), dtype=dtype, device=self.rows.device)
        loading.load_tile(tile)(
            *(self.rows, None, self.weight, m_tiles),
            torch.tensor([len(m_tiles)], dtype=torch.int32, device=out.device),
            out,
            weight_format=NVFP4,
            act_format=BF16,
            weight_factors=self.factors,
        )
        return out


@pytest.mark.parametrize(("k", "n"), [(32, 64), (96, 80), (160, 272), (640, 272), (2880, 512)])
def test_every_tile_has_the_published_rules_bits(k: int, n: int, device: torch.device) -> None:
    problem = Problem(k, n, device)
    expected = problem.expected(rule_of(device))
    for tile in tiles_here(device):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wanted = torch.where(expected.isnan(), float("nan"), expected.to(dtype))
            out = problem.run(tile, dtype)
            valid = int(problem.offsets[-1])
            assert torch.equal(bits(out[:valid]), bits(wanted[:valid])), f"{tile.name}, {dtype}"
            assert out[valid:].isnan().all(), f"{tile.name}, {dtype}: rows of no expert"


def test_every_code_under_every_scale_is_exact(device: torch.device) -> None:
    """Rows with a single one in K: a sum is a weight times its factor."""
    problem, (n, k) = Problem(160, 64, device, (160,)), (64, 160)
    codes = (torch.arange(k) + torch.arange(n)[:, None]) % 16
    scales = (10 * torch.arange(n)[:, None] + torch.arange(k // 16)) % SCALES
    met = codes * SCALES + scales.repeat_interleave(16, 1)
    assert len(met.unique()) == 16 * SCALES
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).to(device)
    of_blocks = scales.to(torch.uint8).to(device)
    problem.packed, problem.scales = packed[None], of_blocks[None]
    problem.weight = formats.arrange_weights(packed, of_blocks, formats.WordOrder.PAIRS, 2)[None]
    problem.rows = torch.eye(k, device=device).bfloat16()[torch.arange(k + ROWS_OF_NO_EXPERT, device=device) % k]
    factor = problem.factors[0, torch.arange(n, device=device) % 16 // 8]
    expected = formats.nvfp4_products(packed, of_blocks).T * factor + 0.0
    for tile in tiles_here(device):
        out = problem.run(tile, torch.float32)[:k]
        assert torch.equal(bits(out), bits(expected)), tile.name


@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
def test_layers(tokens: int, activation: str, device: torch.device) -> None:
    """Close to the reference, the same bits from every tile, and of a token alone."""
    layer = nvfp4_cases.with_biases(nvfp4_cases.random_nvfp4(experts=16, hidden=160, inter=96))
    weights = MoEWeights.from_nvfp4(**layer, activation=activation)
    call = random_call(tokens, 4, weights)
    rule = rule_of(device)
    expected = reference.fused_moe(*call.args(), weights, activation_format="bf16", arithmetic=rule).to(device)
    prepared = weights.to(device, activation_format="bf16")
    args = tuple(x.to(device) for x in call.args())
    outs = []
    for tile in tiles_here(device):
        outs.append(mxfp4_moe.fused_moe(*args, prepared, activation_format="bf16", tile_mn=tile.mn))
        assert relative_error(outs[-1], expected) <= TOLERANCE, tile.name
        assert torch.equal(bits(outs[-1]), bits(outs[0])), tile.name
    one = tuple(x.to(device) for x in call.token(tokens // 2).args())
    alone = mxfp4_moe.fused_moe(*one, prepared, activation_format="bf16")
    assert torch.equal(bits(alone[0]), bits(outs[0][tokens // 2]))
