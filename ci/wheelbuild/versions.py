"""ci/cuda-versions.json: the CUDA toolkits of the wheels, the torch to build with, and the assemblers to measure."""

from __future__ import annotations

import json
from dataclasses import dataclass

from wheelbuild import ROOT


@dataclass(frozen=True, kw_only=True)
class CudaVersion:
    label: str  # local version of the wheel, e.g. cu130
    toolkit: str  # e.g. 13.0

    @property
    def requirement(self) -> str:
        """The packages that hold this toolkit's compiler, runtime and headers."""
        return f"cuda-toolkit[nvcc,cudart,cccl]=={self.toolkit}.*"


@dataclass(frozen=True, kw_only=True)
class Versions:
    torch_build: str
    cuda: tuple[CudaVersion, ...]  # the first is the default
    assemblers: tuple[str, ...]  # releases of ptxas that docs/architectures.md and the tests ask, oldest first


def load_versions() -> Versions:
    data = json.loads((ROOT / "ci" / "cuda-versions.json").read_text(encoding="utf-8"))
    return Versions(
        torch_build=data["torch_build"],
        cuda=tuple(CudaVersion(label=row["label"], toolkit=row["toolkit"]) for row in data["versions"]),
        assemblers=tuple(data["assemblers"]),
    )
