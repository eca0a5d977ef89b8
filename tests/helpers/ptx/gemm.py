"""A tile's grouped GEMM, from operands in plain order to what the executed kernel wrote: launcher, tensor maps, PTX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4_moe import formats, reference
from mxfp4_moe.activations import Activation
from mxfp4_moe.arithmetic import of_arch
from mxfp4_moe.problems import ROWS_OF_NO_EXPERT, GemmProblem, offsets_of, random_problem
from mxfp4_moe.tiles import (
    FP4_PAIRS,
    HALF_PAIRS,
    MXFP4_BF16,
    MXFP4_MXFP8,
    Tile,
    prove,
    scale_words,
    weight_block_bytes,
)

from . import abi, fp4_problems, launch
from .fp4_problems import Fp4Problem
from .machine import Machine

PtxChange = Callable[[str], str] | None
LaunchChange = Callable[[launch.Launch], launch.Launch] | None
OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def array(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's own memory as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def pair_of(problem: GemmProblem) -> str:
    """The pair of formats that computes it."""
    if isinstance(problem, Fp4Problem):
        return problem.pair
    return MXFP4_BF16 if problem.row_scales is None else MXFP4_MXFP8


def under_sm12x(problem: GemmProblem) -> GemmProblem:
    """The problem with what SM12x's tensor cores make of it as its expectation."""
    rule = of_arch("120f", pair_of(problem))
    return dataclasses.replace(problem, expected=reference.grouped_gemm(*problem.operands, arithmetic=rule))


def in_bf16(problem: GemmProblem) -> GemmProblem:
    """The problem with bfloat16 rows: what its MXFP8 ones stand for, and as many bits more as bfloat16 has."""
    assert problem.row_scales is not None
    rows = formats.mxfp8_to_bf16(problem.rows, problem.row_scales).view(torch.int16)
    g = torch.Generator().manual_seed(rows.numel())
    more = torch.randint(0, 8, rows.shape, generator=g, dtype=torch.int16)
    return under_sm12x(dataclasses.replace(problem, rows=(rows | more).view(torch.bfloat16), row_scales=None))


def any_problem(k: int, n: int, rows_per_expert: Sequence[int], pair: str = MXFP4_MXFP8) -> GemmProblem:
    """Random bits in every operand."""
    if pair in FP4_PAIRS:
        return fp4_problems.any_problem(k, n, rows_per_expert, pair)
    problem = random_problem(k, n, torch.device("cpu"), rows_per_expert=rows_per_expert)
    if pair != MXFP4_BF16:
        return under_sm12x(problem)
    # Scale bytes from 128 on take a way of their own through a K tile: every second one has none of them.
    small = torch.arange(k // 32) // 4 % 2 == 0
    scales = torch.where(small, problem.scales - 31, problem.scales)
    assert int(scales[..., small].max()) < 128 <= int(scales.max())
    return in_bf16(dataclasses.replace(problem, scales=scales))


def usual_problem(
    k: int, n: int, rows_per_expert: Sequence[int], seed: int = 0, pair: str = MXFP4_MXFP8
) -> GemmProblem:
    """Sums of a few units, as a layer has them: for activations."""
    if pair in FP4_PAIRS:
        return fp4_problems.usual_problem(k, n, rows_per_expert, pair, seed=seed)
    g = torch.Generator().manual_seed(seed)
    offsets = offsets_of(rows_per_expert, torch.device("cpu"))
    rows, experts = int(offsets[-1]) + ROWS_OF_NO_EXPERT, len(rows_per_expert)
    codes, row_scales = formats.quantize_mxfp8(torch.randn(rows, k, generator=g))
    packed = torch.randint(0, 256, (experts, n, k // 2), generator=g, dtype=torch.uint8)
    scales = torch.randint(119, 124, (experts, n, k // 32), generator=g, dtype=torch.uint8)
    operands = {"rows": codes, "row_scales": row_scales, "packed": packed, "scales": scales, "offsets": offsets}
    problem = GemmProblem(**operands, expected=torch.empty(rows, n))
    return in_bf16(problem) if pair == MXFP4_BF16 else under_sm12x(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epilogue:
    """GEMM1's activation; numbers are one for all, or float32 [E]."""

    activation: Activation
    rounding: torch.dtype = torch.float32
    bias: Tensor | None = None  # float32 [E, N]
    alpha: float | Tensor = 1.702
    beta: float | Tensor = 1.0
    limit: float | Tensor = 7.0
    global_scales: Tensor | None = None  # float32 [E], of NVFP4
    folded: str | None = None  # the format whose values bfloat16 rows are to hold


def junk(tile: Tile, k: int, pair: str = MXFP4_MXFP8, arch: str = "120f") -> list[range]:
    """Shared memory that a kernel reads although nobody wrote it, whatever is there.

    Packed weights that a last K tile of less than 128 lacks: any bits, times zeros. Rows of bf16 and fp16
    activations that an m-tile does not have, which come in boxes: they meet weights in sums that are stored nowhere.
    """
    proof = prove(tile, arch, pair)
    weights = proof.stages * proof.act_bytes  # they lie behind the stages' activations
    scales, block = 256 * scale_words(pair), weight_block_bytes(pair)
    first = scales + k % 128 // 32 * 1024  # of a block of scales and four steps of 1024 bytes
    blocks = proof.stages * proof.weight_bytes // block
    found = [range(weights + b * block + first, weights + (b + 1) * block) for b in range(blocks) if first > scales]
    return [range(weights), *found] if proof.reads_halves and tile.m > 16 else found


class Gemm:
    """One problem's operands in a machine's memory."""

    def __init__(self, problem: GemmProblem, tile: Tile, machine: Machine, arch: str = "120f") -> None:
        self.problem, self.tile, self.machine, self.pair = problem, tile, machine, pair_of(problem)
        self.arch = arch
        rows, experts = problem.rows.shape[0], problem.packed.shape[0]
        tiles = reference.m_tiles(problem.offsets, tile.m)
        self.bound = (rows + min(rows, experts) * (tile.m - 1)) // tile.m
        junk = torch.tensor([[0, int(problem.offsets[-1]), rows, 0]], dtype=torch.int32)
        experts_weights = zip(problem.packed, problem.scales, strict=True)
        orders = dict.fromkeys(HALF_PAIRS, formats.WordOrder.PAIRS) | {MXFP4_MXFP8: formats.WordOrder.CONTAINERS}
        in_order, words = orders.get(self.pair, formats.WordOrder.PLAIN), scale_words(self.pair)
        self.operands = {
            "weight": torch.stack([formats.arrange_weights(p, s, in_order, words) for p, s in experts_weights]),
            "m_tiles": torch.cat([tiles, junk.expand(self.bound - len(tiles), 4)]),
            "num_m_tiles": torch.tensor([len(tiles)], dtype=torch.int32),
        }
        if problem.row_scales is None:
            self.operands["act"] = problem.rows.clone()
        else:
            is_fp4 = isinstance(problem, Fp4Problem)
            self.operands["act"] = problem.rows.clone() if is_fp4 else formats.interleave_k(problem.rows)
            whole = torch.nn.functional.pad(problem.row_scales, (0, -problem.row_scales.shape[1] % (4 * words)))
            self.operands["act_scale"] = formats.pack_row_scales(whole)
        self.factors: dict[str, int | None] = {}
        if isinstance(problem, Fp4Problem):
            self.factors = {name: self.constant(name, getattr(problem, name)) for name in ("of_weights", "of_inputs")}
            if problem.of_rows is not None:
                self.operands["of_rows"] = problem.of_rows.clone()
        for name, tensor in self.operands.items():
            machine.memory.add(name, array(tensor), written=True, writable=name != "weight")

    def output(self, name: str, tensor: Tensor) -> int:
        """Registers what the kernel writes; returns its address."""
        self.machine.memory.add(name, array(tensor), written=False, writable=True)
        return tensor.data_ptr()

    def constant(self, name: str, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.machine.memory.add(name, array(tensor), written=True, writable=False)
        return tensor.data_ptr()

    def args(self, m_tiles_are_ready: bool) -> abi.GemmArgs:
        rows, (experts, n, half) = self.problem.rows.shape[0], self.problem.packed.shape
        addresses = {name: tensor.data_ptr() for name, tensor in self.operands.items()}
        self.factors["of_rows"] = addresses.pop("of_rows", None)
        return abi.GemmArgs(
            **addresses,
            factors=abi.Factors(**self.factors),
            max_m_tiles=self.bound,
            rows=rows,
            n=n,
            k=2 * half,
            experts=experts,
            m_tiles_are_ready=int(m_tiles_are_ready),
            **dict(zip(("weight_format", "act_format"), abi.formats_of(self.pair), strict=True)),
        )

    def execute(
        self, args: abi.GemmArgs, sms: int, change: PtxChange = None, change_launch: LaunchChange = None
    ) -> None:
        """What the launcher launches, while the kernel that wrote the activations may still run.

        change, change_launch: make another kernel of the tile's PTX, another launch of the launcher's.
        """
        ptx = launch.ptx_of_tile(self.tile, self.arch, self.pair)
        (one,) = launch.shared_recorder().gemm_of(self.tile, self.pair, args, sms=sms, arch=self.arch)
        if change_launch is not None:
            one = change_launch(one)
        late = [name for name in ("act", "act_scale", "of_rows") if name in self.operands]
        self.machine.pretend_kernel(late if args.m_tiles_are_ready else [*late, "m_tiles", "num_m_tiles"])
        unwritten = junk(self.tile, args.k, self.pair, self.arch)
        self.machine.run(ptx if change is None else change(ptx), one, junk=unwritten)

    def run(
        self,
        dtype: torch.dtype,
        *,
        sms: int = 1,
        m_tiles_are_ready: bool = False,
        **changes: Any,
    ) -> Tensor:
        """The output [R, N], poisoned with NaN before."""
        out = torch.full(self.problem.expected.shape, float("nan"), dtype=dtype)
        args = self.args(m_tiles_are_ready)
        args.out, args.out_type = self.output("out", out), OUT_TYPES[dtype]
        self.execute(args, sms, **changes)
        return out

    def run_activated(
        self,
        epilogue: Epilogue,
        *,
        sms: int = 1,
        m_tiles_are_ready: bool = True,
        **changes: Any,
    ) -> tuple[Tensor, Tensor]:
        """Codes [R, N/2], even k first, and packed scales as GEMM2 reads them; 0xAA where nothing was written.

        Of bf16 and fp16 rows, values as they come: uint8 [R, N], and scales that nobody writes. Of FP4 rows packed
        codes, uint8 [R, N/4].
        """
        rows, n = self.problem.expected.shape
        width = n if self.pair in HALF_PAIRS else n // 4 if self.pair in FP4_PAIRS else n // 2
        codes = torch.full((rows, width), 0xAA, dtype=torch.uint8)
        scales = torch.full((-(-n // 256) * scale_words(self.pair), -(-rows // 4) * 4, 4), 0xAA, dtype=torch.uint8)
        args = self.args(m_tiles_are_ready)
        to = args.activate
        to.rows, to.scales = self.output("codes", codes), self.output("scales", scales)
        to.bias, to.format = self.constant("bias", epilogue.bias), args.act_format
        if epilogue.folded is not None:
            to.format = abi.ACT_FORMATS.index(epilogue.folded)
        to.global_scales = self.constant("global_scales", epilogue.global_scales)
        to.activation, to.rounding = epilogue.activation.code, OUT_TYPES[epilogue.rounding]
        for name in ("alpha", "beta", "limit"):
            number = getattr(epilogue, name)
            if isinstance(number, Tensor):
                getattr(to, name).values = self.constant(name, number)
            else:
                getattr(to, name).value = math.inf if number is None else number
        self.execute(args, sms, **changes)
        return codes, scales
