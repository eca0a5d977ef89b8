"""A tile's grouped GEMM, from operands in plain order to what the executed kernel wrote: launcher, tensor maps, PTX."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mxfp4_moe import formats, reference
from mxfp4_moe.problems import GemmProblem
from mxfp4_moe.tiles import Tile, prove

from . import abi, launch
from .machine import Machine

OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def array(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's own memory as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def junk(tile: Tile, k: int) -> list[range]:
    """Packed weights that a last K tile of less than 128 lacks: any bits, times zeros (csrc/tile/kernel.cuh)."""
    proof = prove(tile, "120f")
    weights = proof.stages * tile.m * 128  # behind the stages' activations
    first = 256 + k % 128 // 32 * 1024  # of a block of 256 + 4 * 1024 bytes
    blocks = proof.stages * -(-tile.n // 64)
    return [range(weights + b * 4352 + first, weights + (b + 1) * 4352) for b in range(blocks) if first > 256]


class Gemm:
    """One problem's operands in a machine's memory."""

    def __init__(self, problem: GemmProblem, tile: Tile, machine: Machine) -> None:
        self.problem, self.tile, self.machine = problem, tile, machine
        rows, experts = problem.codes.shape[0], problem.packed.shape[0]
        self.act = formats.interleave_k(problem.codes)
        self.act_scale = formats.pack_row_scales(problem.row_scales)
        order = formats.WordOrder.CONTAINERS
        self.weight = torch.stack(
            [formats.arrange_weights(p, s, order) for p, s in zip(problem.packed, problem.scales, strict=True)]
        )
        tiles = reference.m_tiles(problem.offsets, tile.m)
        self.bound = (rows + min(rows, experts) * (tile.m - 1)) // tile.m
        junk = torch.tensor([[0, int(problem.offsets[-1]), rows, 0]], dtype=torch.int32)
        self.m_tiles = torch.cat([tiles, junk.expand(self.bound - len(tiles), 4)]).contiguous()
        self.num_m_tiles = torch.tensor([len(tiles)], dtype=torch.int32)
        for name in ("act", "act_scale", "weight", "m_tiles", "num_m_tiles"):
            machine.memory.add(name, array(getattr(self, name)), written=True, writable=name != "weight")

    def args(self, m_tiles_are_ready: bool) -> abi.GemmArgs:
        rows, k = self.problem.codes.shape
        experts, n, _ = self.problem.packed.shape
        return abi.GemmArgs(
            act=self.act.data_ptr(),
            act_scale=self.act_scale.data_ptr(),
            weight=self.weight.data_ptr(),
            m_tiles=self.m_tiles.data_ptr(),
            num_m_tiles=self.num_m_tiles.data_ptr(),
            max_m_tiles=self.bound,
            rows=rows,
            n=n,
            k=k,
            experts=experts,
            m_tiles_are_ready=int(m_tiles_are_ready),
        )

    def execute(self, args: abi.GemmArgs, sms: int, change: Callable[[str], str] = lambda ptx: ptx) -> None:
        """The launcher's launch of the tile's PTX, while the kernel that wrote the activations may still run."""
        ptx = change(launch.ptx_of_tile(self.tile))
        (one,) = launch.shared_recorder().gemm(self.tile, args, sms=sms)
        late = ["act", "act_scale"] if args.m_tiles_are_ready else ["act", "act_scale", "m_tiles", "num_m_tiles"]
        self.machine.pretend_kernel(late)
        self.machine.run(ptx, one, junk=junk(self.tile, self.problem.codes.shape[1]))

    def run(
        self,
        dtype: torch.dtype,
        *,
        sms: int = 1,
        m_tiles_are_ready: bool = False,
        change: Callable[[str], str] = lambda ptx: ptx,
    ) -> Tensor:
        """The output [R, N], poisoned with NaN before."""
        out = torch.full(self.problem.expected.shape, float("nan"), dtype=dtype)
        self.machine.memory.add("out", array(out), written=False, writable=True)
        args = self.args(m_tiles_are_ready)
        args.out, args.out_type = out.data_ptr(), OUT_TYPES[dtype]
        self.execute(args, sms, change)
        return out
