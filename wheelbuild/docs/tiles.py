"""docs/tiles.md: every tile that was considered for the wheel, with its proof and the verdict.

`python -m wheelbuild.docs.tiles` writes it, from tiles.prove and the manifest alone; `--check` says whether it is
current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wheelbuild import ROOT
from wheelbuild.tile_model import tiles

if TYPE_CHECKING:
    from mxfp4_moe.tiles import Manifest, TileProof

DOCUMENT = Path("docs/tiles.md")

INTRODUCTION = """# Tiles

Written by `python -m wheelbuild.docs.tiles` from `tiles.prove` and `tile_manifest.toml`; a test keeps it current.

A tile computes M activation rows (tokens of one expert) by N weight rows (output features). The {count} candidates are
native M in 64, 128, 256 by N in 8 to 256, and swapped M in 8, 16, 32 by N in 64 to 256. A swapped tile feeds weights to
the MMA's A operand, which takes 16 rows at a time, and activations to B, which takes 8, so a small M wastes little.
{verdict}

SM90 has one kernel for a tile, which reads bf16 whatever MXFP4 weights' activations were, but fp16, and in profile
`full` one for NVFP4 weights, and those of fp16; SM12x has one for MXFP8 and in profile `full` one for each pair of
formats more. Each K tile of 128 is one pipeline stage in shared memory: activations; 4,352 bytes of MXFP4 weights for
each 64 rows of N or part of them, 64 of packed E2M1 and 4 of scales per row, or 4,608 of NVFP4 weights, with 8 of
scales; and 16 bytes of barriers. A kernel that applies the activation of GEMM1 itself and quantizes it has a table
besides, once for all stages: 4 bytes for each row of M and warp along N, on SM90 with NVFP4 weights for two warps of 16
rows together. A pipeline needs two stages, and is as deep as fits, up to {max_stages}. A block's warps compute "warp
tile" rows of A by columns of B each, and one more warp fetches.

**SM12x** (`csrc/tile/tile_shape.cuh`): a stage's activations are M x 128 bytes of E4M3, and 4 bytes of scales per row
of M and 4 rows more, since an expert's rows start anywhere (in whole 128 bytes). A thread holds at most {accumulators}
fp32 accumulators; more leave too few of 255 registers for operands. Tiles with N of at least 64 and at most
{activating} accumulators activate; with more, ptxas spills. Where eight warps hold 64 accumulators or more, the warp
that fetches brings a whole warpgroup, whose registers go to the others. Up to {max_blocks} blocks share an SM, as many
as leave each three stages, and its threads the registers that their accumulators ask for.

**SM12x, FP4 activations** (the same): M x 64 bytes of packed E2M1, and the scales of MXFP8, of NVFP4 twice. From N = 64
on weights are A whatever the tile's mode.

**SM12x, bf16 and fp16 activations** (`csrc/tile/sm12x/bf16_tile_shape.cuh`): a stage's activations are M x 256 bytes,
so that two stages of 256 rows do not fit, nor of 128 beside 256 of NVFP4 weights. The kernel is SM90's for few rows,
`grouped_gemm_mma_sync`; from N = 64 on weights are A whatever the tile's mode, and from M x N = 16,384 on eight warps
share them. It writes the activation of GEMM1 as it comes, and needs no table for that.

**SM90** (`csrc/tile/sm90/tile_shape.cuh`): a stage's activations are M x 256 bytes of bf16 or fp16 without scales. From
M = 32 and N = 64 on a tile's kernel is `grouped_gemm_wgmma`, where weights are A whatever the tile's mode, 64 rows
to a warpgroup; the others have `grouped_gemm_mma_sync`. Tiles with N of at least 64 activate.

The build compares this proof with the constants of every compiled kernel, for each arch.

`mxfp4-moe tiles` shows the tiles of an installed wheel with registers and instructions per MMA as compiled, and
`mxfp4-moe tiles --explain M,N` this proof for any tile.
"""

COLUMNS = (
    *("M", "N", "mode", "kernel", "MMA warps", "warp tile", "threads", "accumulators"),
    *("activations", "weights and scales", "activation scales", "barriers", "bytes per stage"),
    *("stages", "once per block", "shared memory", "blocks per SM", "verdict"),
)


def _cells(proof: TileProof, manifest: Manifest) -> list[str]:
    tile = proof.tile
    having = [
        profile.name
        for profile in manifest.profiles
        if tile in manifest.tiles
        and proof.pair in tiles.kernel_pairs(proof.arch, manifest.pairs_of(profile.name, tile))
    ]
    where = "in the wheel" if len(having) == len(manifest.profiles) else f"in profile {', '.join(having)}"
    verdict = where if having else "fits; not in the manifest"
    return [
        *(f"{tile.m}", f"{tile.n}", "swapped" if tile.swap_ab else "native", f"`{proof.function}`"),
        *(f"{proof.warps_m} x {proof.warps_n}", f"{proof.warp_m} x {proof.warp_n}"),
        *(f"{proof.threads}", f"{proof.accumulator_registers}"),
        *(f"{proof.act_bytes:,}", f"{proof.weight_bytes:,}", f"{proof.act_scale_bytes:,}"),
        *(f"{proof.barrier_bytes}", f"{proof.stage_bytes + proof.barrier_bytes:,}"),
        *(f"{proof.stages}", f"{proof.amax_bytes + proof.kept_bytes:,}"),
        *(f"{proof.smem_bytes:,}", f"{proof.blocks_per_sm}" if proof.legal else "-"),
        verdict if proof.legal else "impossible: " + "; ".join(proof.refusals),
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; numbers to the right."""
    rule = [":--" if name in ("mode", "kernel", "verdict") else "--:" for name in COLUMNS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, rule, *rows)) + "\n"


def _listed(proofs: Sequence[TileProof]) -> str:
    return ", ".join(f"({proof.tile.m}, {proof.tile.n})" for proof in proofs)


def _section(arch: str, pair: str, proofs: Sequence[TileProof], manifest: Manifest) -> str:
    """An arch's kernels of one pair: what its blocks have, which tiles have the shallowest pipeline, and the table."""
    few = [proof for proof in proofs if proof.legal and proof.stages == 2]
    fit = f"Only two stages fit in {_listed(few)}." if few else "Every tile that fits has three stages or more."
    memory = f"A block has at most {tiles.max_smem_per_block(arch):,} bytes of shared memory. {fit}"
    return f"\n## sm_{arch}, {pair}\n\n{memory}\n\n" + _table([_cells(proof, manifest) for proof in proofs])


def document(manifest: Manifest) -> str:
    """The text of docs/tiles.md for this manifest."""
    pairs = [pair for pair in tiles.PAIRS if any(pair in profile.pairs for profile in manifest.profiles)]
    kernels = [(arch, pair) for arch in manifest.archs for pair in tiles.kernel_pairs(arch, pairs)]
    proofs = {kernel: [tiles.prove(tile, *kernel) for tile in tiles.CANDIDATES] for kernel in kernels}
    everywhere = [proofs[arch, tiles.kernel_pair(arch, tiles.MXFP4_MXFP8)] for arch in manifest.archs]
    each = list(zip(*everywhere, strict=True))  # per tile, the archs' proofs for MXFP8 activations
    legal = [alike[0].tile for alike in each if all(proof.legal for proof in alike)]
    refused = [alike[0] for alike in each if alike[0].tile not in legal]
    shipped = sum(tile in manifest.tiles for tile in legal)
    introduction = INTRODUCTION.format(
        count=len(each),
        verdict=f"{len(legal)} fit, {shipped} of them are in the wheel; {_listed(refused)} cannot be.",
        activating=tiles.MAX_ACTIVATING_ACCUMULATORS,
        max_stages=tiles.MAX_STAGES,
        max_blocks=tiles.MAX_BLOCKS_PER_SM,
        accumulators=tiles.MAX_ACCUMULATORS,
    )
    return introduction + "".join(_section(*kernel, proofs[kernel], manifest) for kernel in kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"only say whether {DOCUMENT} is current")
    path = ROOT / DOCUMENT
    text = document(tiles.load_manifest(ROOT / tiles.MANIFEST_NAME))
    if not parser.parse_args().check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{DOCUMENT} is not current: python -m wheelbuild.docs.tiles", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
