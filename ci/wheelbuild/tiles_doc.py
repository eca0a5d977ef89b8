"""docs/tiles.md: every tile that was considered for the wheel, with its proof and the verdict.

`python -m wheelbuild.tiles_doc` writes it, from tiles.prove and the manifest alone; `--check` says whether it is
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
    from mxfp4_moe.tiles import Manifest, Tile, TileProof

DOCUMENT = Path("docs/tiles.md")

INTRODUCTION = """# Tiles

Written by `python -m wheelbuild.tiles_doc` from `tiles.prove` and `tile_manifest.toml`; a test keeps it current.

A tile computes M activation rows (tokens of one expert) by N weight rows (output features). The {count} candidates are
native M in 64, 128, 256 by N in 8 to 256, and swapped M in 8, 16, 32 by N in 64 to 256. A swapped tile feeds weights to
the MMA's A operand, which takes 16 rows at a time, and activations to B, which takes 8, so a small M wastes little.
{verdict}

Each K tile of 128 is one pipeline stage in shared memory: M x 128 bytes of E4M3 activations, N x 64 bytes of packed
E2M1 weights, 512 bytes of weight scales per 128 rows of N, 4 bytes of activation scales per row of M and 4 rows more,
since an expert's rows start anywhere (in whole 128 bytes), and 16 bytes of barriers. A block has {smem:,} bytes, which
is what SM120 and SM121 have; SM90 has more, and runs the same schedule. A pipeline needs two stages, and is as deep as
fits, up to eight. Where two blocks of three stages or more fit on an SM, two run.

A thread holds at most {accumulators} fp32 accumulators; more leave too few of 255 registers for operands. Its warp
computes "warp tile" rows of A by columns of B, in whole MMAs of 16 x 8. One more warp fetches; where eight warps hold
64 accumulators or more, it brings a whole warpgroup, whose registers go to the others.

The proof is the same on {archs}; the build compares it with the constants of every compiled tile.

`mxfp4-moe tiles` shows the tiles of an installed wheel with registers and instructions per MMA as compiled, and
`mxfp4-moe tiles --explain M,N` this proof for any tile.
"""

COLUMNS = (
    *("M", "N", "mode", "MMA warps", "warp tile", "threads", "accumulators"),
    *("activations", "weights", "weight scales", "activation scales", "barriers"),
    *("bytes per stage", "stages", f"shared memory, of {tiles.MAX_SMEM_PER_BLOCK:,}", "blocks per SM", "verdict"),
)


def _cells(proof: TileProof, manifest: Manifest) -> list[str]:
    tile = proof.tile
    verdict = "in the wheel" if tile in manifest.tiles else "fits; not in the manifest"
    return [
        *(f"{tile.m}", f"{tile.n}", "swapped" if tile.swap_ab else "native"),
        *(f"{proof.warps_m} x {proof.warps_n}", f"{proof.warp_m} x {proof.warp_n}"),
        *(f"{proof.threads}", f"{proof.accumulator_registers}"),
        *(f"{part:,}" for part in (proof.act_bytes, proof.weight_bytes, proof.weight_scale_bytes)),
        *(f"{proof.act_scale_bytes:,}", f"{proof.barrier_bytes}", f"{proof.stage_bytes + proof.barrier_bytes:,}"),
        *(f"{proof.stages}", f"{proof.smem_bytes:,}", f"{proof.blocks_per_sm}" if proof.legal else "-"),
        verdict if proof.legal else "impossible: " + "; ".join(proof.refusals),
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; numbers to the right."""
    rule = [":--" if name in ("mode", "verdict") else "--:" for name in COLUMNS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, rule, *rows)) + "\n"


def _prove(tile: Tile, archs: Sequence[str]) -> TileProof:
    proof, *others = (tiles.prove(tile, arch) for arch in archs)
    for other in others:
        assert (other.facts(), other.refusals) == (proof.facts(), proof.refusals), "the table has one row for all archs"
    return proof


def document(manifest: Manifest) -> str:
    """The text of docs/tiles.md for this manifest."""
    proofs = [_prove(tile, manifest.archs) for tile in tiles.CANDIDATES]
    legal = [proof.tile for proof in proofs if proof.legal]
    refused = ", ".join(f"({proof.tile.m}, {proof.tile.n})" for proof in proofs if not proof.legal)
    shipped = sum(tile in manifest.tiles for tile in legal)
    few = [f"({p.tile.m}, {p.tile.n})" for p in proofs if p.legal and p.stages == 2]
    introduction = INTRODUCTION.format(
        count=len(proofs),
        verdict=f"{len(legal)} fit, {shipped} of them are in the wheel; {refused} cannot be.\n"
        f"Only two stages fit in {', '.join(few)}.",
        smem=tiles.MAX_SMEM_PER_BLOCK,
        accumulators=tiles.MAX_ACCUMULATORS,
        archs=" and ".join(f"sm_{arch}" for arch in manifest.archs),
    )
    return introduction + "\n" + _table([_cells(proof, manifest) for proof in proofs])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"only say whether {DOCUMENT} is current")
    path = ROOT / DOCUMENT
    text = document(tiles.load_manifest(ROOT / tiles.MANIFEST_NAME))
    if not parser.parse_args().check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{DOCUMENT} is not current: PYTHONPATH=ci python -m wheelbuild.tiles_doc", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
