"""ci/cuda-versions.json: which CUDA toolkits wheels are built for, where, with which torch; which ptxas are measured.

`python -m wheelbuild.versions matrix` prints the release workflow's matrix; `... labels` the labels whose compiler
comes from PyPI, which is what can be built without a container; `... toolchain` what MXFP4_MOE_TOOLCHAIN must be for
the label that MXFP4_MOE_CUDA names; `... document` writes the table of docs/wheels.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wheelbuild import ROOT, BuildError

LABEL_VARIABLE = "MXFP4_MOE_CUDA"  # which of the labels to build; unset: whatever toolkit is found
DOCUMENT = Path("docs/wheels.md")
BEGIN, END = "<!-- from ci/cuda-versions.json -->", "<!-- end -->"
RUNNERS = {"linux_x86_64": "ubuntu-24.04", "linux_aarch64": "ubuntu-24.04-arm"}  # whose processor is the wheel's
_WORDS = {
    "built": "built",
    "audited": "audited",
    "emulated": "loaded under emulation",
    "cpu": "run on CPU",
    "sm90": "run on SM90",
    "sm120": "run on SM120",
    "sm121": "run on SM121",
}


@dataclass(frozen=True, kw_only=True)
class Platform:
    name: str  # linux_x86_64 or linux_aarch64
    image: str  # a name that cibuildwheel pins, or an address
    verified: tuple[str, ...]

    @property
    def machine(self) -> str:
        return self.name.removeprefix("linux_")


@dataclass(frozen=True, kw_only=True)
class CudaVersion:
    label: str  # local version of the wheel, e.g. cu130
    toolkit: str  # e.g. 13.0
    compiler: str  # where nvcc comes from: packages or image
    name_suffix: str  # of the wheel for PyPI, e.g. cu13; empty: this version is not published there
    platforms: tuple[Platform, ...]

    @property
    def requirement(self) -> str:
        """The packages that hold this toolkit's compiler, runtime and headers."""
        return f"cuda-toolkit[nvcc,cudart,cccl]=={self.toolkit}.*"

    @property
    def toolchain(self) -> str:
        """MXFP4_MOE_TOOLCHAIN for this version: the packages and nothing else, or whatever CUDA is there."""
        return "pypi" if self.compiler == "packages" else ""


@dataclass(frozen=True, kw_only=True)
class Versions:
    torch_build: str
    cuda: tuple[CudaVersion, ...]  # the first is the default
    assemblers: tuple[str, ...]  # releases of ptxas that docs/architectures.md and the tests ask, oldest first

    def choose(self, env: Mapping[str, str]) -> CudaVersion:
        """The version that MXFP4_MOE_CUDA names, else the default; BuildError with the list for an unknown one."""
        label = env.get(LABEL_VARIABLE) or self.cuda[0].label
        for version in self.cuda:
            if version.label == label:
                return version
        known = ", ".join(version.label for version in self.cuda)
        raise BuildError(f"{LABEL_VARIABLE}: {label!r} is not in ci/cuda-versions.json, which has {known}")


def load_versions() -> Versions:
    data = json.loads((ROOT / "ci" / "cuda-versions.json").read_text(encoding="utf-8"))
    return Versions(
        torch_build=data["torch_build"],
        cuda=tuple(
            CudaVersion(
                label=row["label"],
                toolkit=row["toolkit"],
                compiler=row["compiler"],
                name_suffix=row.get("name_suffix", ""),
                platforms=tuple(
                    Platform(name=name, image=platform["image"], verified=tuple(platform["verified"]))
                    for name, platform in row["platforms"].items()
                ),
            )
            for row in data["versions"]
        ),
        assemblers=tuple(data["assemblers"]),
    )


def matrix(versions: Versions) -> dict[str, list[dict[str, str]]]:
    """The release workflow's matrix: a row per wheel, those for the index of their label (no suffix) and for PyPI."""
    return {
        "include": [
            {
                "wheel": f"{version.label}{suffix and '-pypi'}-{platform.machine}",
                "label": version.label,
                "suffix": suffix,
                "machine": platform.machine,
                "runner": RUNNERS[platform.name],
                "image": platform.image,
                "toolchain": version.toolchain,
            }
            for version in versions.cuda
            for platform in version.platforms
            for suffix in ("", *filter(None, [version.name_suffix]))
        ]
    }


def table(versions: Versions) -> str:
    """The wheels as a Markdown table, with what each has been through."""
    rows = ["| label | CUDA | platform | compiler from | container | so far |", "|---|---|---|---|---|---|"]
    for version in versions.cuda:
        for platform in version.platforms:
            compiler = "PyPI" if version.compiler == "packages" else "container"
            done = ", ".join(_WORDS[word] for word in platform.verified) or "configuration only"
            image = platform.image.rsplit("/", 1)[-1]
            rows.append(f"| {version.label} | {version.toolkit} | {platform.name} | {compiler} | `{image}` | {done} |")
    return "\n".join(rows)


def document(text: str, versions: Versions) -> str:
    """The page `text` with the table between its marks as the version file has it."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"{DOCUMENT} has lost the marks around its table"
    return f"{head}{begin}\n{table(versions)}\n{end}{tail}"


def main(what: str) -> None:
    versions = load_versions()
    if what == "matrix":
        print(json.dumps(matrix(versions)))
    elif what == "labels":
        print("\n".join(version.label for version in versions.cuda if version.compiler == "packages"))
    elif what == "toolchain":
        print(versions.choose(os.environ).toolchain)
    elif what == "document":
        path = ROOT / DOCUMENT
        path.write_text(document(path.read_text(encoding="utf-8"), versions), encoding="utf-8")
    else:
        sys.exit(f"error: expected matrix, labels, toolchain or document, got {what!r}")


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"error: {error}")
