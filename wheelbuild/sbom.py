"""The wheel's bill of materials: a CycloneDX document in .dist-info/sboms (PEP 770).

It names what is compiled into the libraries (headers of others), and what they need when they are loaded. Nothing in it
depends on where or when the wheel was built, so that equal wheels have equal ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from wheelbuild.toolchain import Toolchain

SBOM_NAME = "mxfp4-moe.cdx.json"
NVIDIA_EULA = {"license": {"name": "NVIDIA CUDA Toolkit EULA", "url": "https://docs.nvidia.com/cuda/eula/index.html"}}


def _spdx(expression: str) -> dict[str, str]:
    return {"expression": expression}


def _purl(kind: str, name: str, version: str) -> str:
    return f"pkg:{kind}/{name}@{quote(version)}"


def _component(
    name: str, version: str, licence: Mapping[str, Any], description: str, *, package: str | None = None
) -> dict[str, Any]:
    """A library that is compiled in (scope "required") under its upstream name; `package` is what it came from."""
    reference = _purl("pypi", package, version) if package else _purl("generic", name.lower(), version)
    return {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": version,
        "scope": "required",
        "licenses": [dict(licence)],
        "purl": reference,
        "description": description,
    }


def components(toolchain: Toolchain) -> list[dict[str, Any]]:
    """Everybody else's part in the wheel; 3rdparty/README.md says the same for people."""
    cuda = ".".join(map(str, toolchain.cuda.version))
    torch = toolchain.torch.version.partition("+")[0]
    return [
        _component(
            "CUTLASS",
            toolchain.cutlass.version,
            _spdx("BSD-3-Clause"),
            "CUTLASS and CuTe headers, compiled into every tile",
            package="nvidia-cutlass",
        ),
        _component(
            "CCCL",
            cuda,
            _spdx("Apache-2.0 WITH LLVM-exception"),
            "libcu++ headers of the CUDA toolkit, compiled into every library",
        ),
        _component(
            "CUDA-Toolkit",
            cuda,
            NVIDIA_EULA,
            "CUDA runtime headers and device functions, compiled into every library; libcudart is not in the wheel",
        ),
        _component(
            "PyTorch",
            torch,
            _spdx("BSD-3-Clause"),
            "headers of the stable C++ ABI, compiled into every library; torch itself is not in the wheel",
            package="torch",
        ),
    ]


def make_sbom(distribution: str, version: str, toolchain: Toolchain, libraries: Mapping[str, str]) -> dict[str, Any]:
    """The document. `libraries` are the SHA-256 of the extensions by their path in the wheel."""
    reference = _purl("pypi", distribution, version)
    parts = components(toolchain)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": reference,
                "name": distribution,
                "version": version,
                "licenses": [_spdx("Apache-2.0")],
                "purl": reference,
                "components": [
                    {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": content}]}
                    for name, content in sorted(libraries.items())
                ],
            },
            "tools": {
                "components": [
                    {"type": "application", "name": "nvcc", "version": ".".join(map(str, toolchain.cuda.version))},
                    {"type": "application", "name": toolchain.cxx_version},
                ]
            },
        },
        "components": parts,
        "dependencies": [
            {"ref": reference, "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }


def write_sbom(dist_info: Path, report: Mapping[str, Any], toolchain: Toolchain) -> None:
    """Into a wheel's .dist-info folder, from the build report."""
    entries = [*report["tiles"].values(), report["moe"]]
    libraries = {f"mxfp4_moe/{entry['library']['file']}": entry["library"]["sha256"] for entry in entries}
    document = make_sbom(report["distribution"], report["version"], toolchain, libraries)
    folder = dist_info / "sboms"
    folder.mkdir(exist_ok=True)
    (folder / SBOM_NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
