"""Settings, a toolchain and plans for the tests of the builder; no compiler is needed."""

from __future__ import annotations

from pathlib import Path

from wheelbuild import ROOT
from wheelbuild.plan import Plan, plan
from wheelbuild.settings import Settings, read_settings
from wheelbuild.thresholds import Thresholds
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import (
    Cuda,
    Headers,
    Toolchain,
    Torch,
)

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")
MOE_SOURCES = [Path("csrc/moe/route.cu"), Path("csrc/moe/operators.cpp")]
TOOLCHAIN = Toolchain(
    cuda=Cuda(
        origin="CUDA_HOME",
        version=(13, 0, 88),
        nvcc=Path("/cuda/bin/nvcc"),
        include_dirs=(Path("/cuda/include"),),
        cudart=Path("/cuda/lib/libcudart.so.13"),
        cuobjdump=Path("/cuda/bin/cuobjdump"),
    ),
    cutlass=Headers(version="4.2.0", include_dirs=(Path("/cutlass/include"),)),
    torch=Torch(version="2.13.0", include_dirs=(Path("/torch/include"),), library_dir=Path("/torch/lib")),
    python=Headers(version="3.11", include_dirs=(Path("/python/include"),)),
    cxx=Path("/usr/bin/g++"),
    cxx_version="g++ 12",
)
THRESHOLDS = Thresholds(
    instructions_per_mma={"120f": {"mxfp4_mxfp8": {"m128n128": 3.5}}},
    peak_mb=2000,
    wheel_bytes={"mxfp4_minimal": 4_000_000, "full": 12_000_000},
)


MINIMAL = {"MXFP4_MOE_BUILD_PROFILE": "mxfp4_minimal"}


def settings(**env: str) -> Settings:
    return read_settings(env, MANIFEST)


def make_plan(chosen: Settings | None = None, folder: str = "build/x/ninja", toolchain: Toolchain = TOOLCHAIN) -> Plan:
    """Without settings that of mxfp4_minimal, whose tiles have one kernel for each arch."""
    return plan(chosen or settings(**MINIMAL), toolchain, THRESHOLDS, MOE_SOURCES, Path(folder))
