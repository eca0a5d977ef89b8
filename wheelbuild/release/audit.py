"""What a wheel of ours must be, beyond what the usual tools check: `python -m wheelbuild.release.audit WHEEL`.

Name, tags, metadata, licences, contents, bill of materials and size, each against the place where it is decided. It
reads the file alone, so any Python can look at a wheel for any platform.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

from wheelbuild import ROOT, BuildError
from wheelbuild.emulation import refuse_emulated
from wheelbuild.plan import MOE_MODULE
from wheelbuild.report import REPORT_NAME
from wheelbuild.sbom import SBOM_NAME
from wheelbuild.settings import NAME
from wheelbuild.thresholds import check_wheel, load_thresholds
from wheelbuild.tile_model import floors, tiles
from wheelbuild.versions import load_versions

TORCH_FLOOR = floors.dotted(floors.TORCH)
_NAME = re.compile(
    rf"mxfp4_moe(?P<suffix>_cu\d{{2,3}})?-(?P<version>[^-]+)-{floors.PYTHON_TAG}-abi3-(?P<platform>(many)?linux_\w+)\.whl"
)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    path: Path
    archive: zipfile.ZipFile
    suffix: str  # of the distribution's name: cu13, or nothing
    version: str
    platform: str  # manylinux_2_28_x86_64, or linux_x86_64 before the repair
    report: dict[str, Any]

    @property
    def dist_info(self) -> str:
        return self.path.name.split(f"-{floors.PYTHON_TAG}")[0] + ".dist-info"

    def text(self, name: str) -> str:
        return self.archive.read(name).decode()

    def metadata(self, name: str) -> Message:
        return Parser().parsestr(self.text(f"{self.dist_info}/{name}"))


def expect(condition: bool, sentence: str) -> None:
    if not condition:
        raise BuildError(sentence)


def open_wheel(path: Path, archive: zipfile.ZipFile) -> Wheel:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise BuildError(f"{path.name}: expected mxfp4_moe[_cuXX]-VERSION-cp310-abi3-PLATFORM.whl")
    return Wheel(
        path=path,
        archive=archive,
        suffix=(match["suffix"] or "").removeprefix("_"),
        version=match["version"],
        platform=match["platform"],
        report=json.loads(archive.read(f"mxfp4_moe/{REPORT_NAME}")),
    )


def check_version(wheel: Wheel) -> None:
    """The toolkit that built it is the one that its version, or its name, claims; and one that we publish."""
    cuda = wheel.report["built_with"]["cuda"]
    label = "cu" + "".join(cuda.split(".")[:2])
    known = [version.label for version in load_versions().cuda]
    expect(label in known, f"built with CUDA {cuda}, which is not in ci/cuda-versions.json ({', '.join(known)})")
    _, _, local = wheel.version.partition("+")
    if wheel.suffix:
        expect(label.startswith(wheel.suffix), f"named {wheel.suffix} and built with CUDA {cuda}")
        expect("cu" not in local, f"version {wheel.version}: with {wheel.suffix} in the name, expected no label in it")
    else:
        expect(local.split(".")[0] == label, f"version {wheel.version}: expected +{label}, for CUDA {cuda}")
    expect(
        wheel.report["version"] == wheel.version,
        f"the build report is of {wheel.report['version']}, not {wheel.version}",
    )


def check_metadata(wheel: Wheel) -> None:
    data = wheel.metadata("METADATA")
    name = NAME + (f"-{wheel.suffix}" if wheel.suffix else "")
    for key, value in (
        ("Name", name),
        ("Version", wheel.version),
        ("License-Expression", "Apache-2.0"),
        ("Requires-Python", f">={floors.dotted(floors.PYTHON)}"),
        ("Description-Content-Type", "text/markdown"),
    ):
        expect(data[key] == value, f"{key} is {data[key]!r}, expected {value!r}")
    expect(wheel.report["distribution"] == name, f"the build report is of {wheel.report['distribution']}, not {name}")
    torch = [line for line in data.get_all("Requires-Dist") or [] if re.match(r"torch\b", line)]
    expect(torch == [f"torch>={TORCH_FLOOR}"], f"requires {torch}, expected torch>={TORCH_FLOOR} and no ceiling")
    expect(len(data.get_all("Project-URL") or []) >= 4, "expected project URLs in the metadata")
    expect(bool(data.get_payload()), "expected the README as the description")
    for licence in ("LICENSE", *(f"3rdparty/licenses/{path.name}" for path in ROOT.glob("3rdparty/licenses/*"))):
        expect(licence in (data.get_all("License-File") or []), f"{licence} is not among the License-File entries")
        inside = wheel.archive.read(f"{wheel.dist_info}/licenses/{licence}")
        expect(inside == (ROOT / licence).read_bytes(), f"{licence} in the wheel is not the source tree's")
    tags = wheel.metadata("WHEEL").get_all("Tag")
    expect(
        tags == [f"{floors.PYTHON_TAG}-abi3-{wheel.platform}"],
        f"WHEEL has the tags {tags}, the file's name {wheel.platform}",
    )


def check_contents(wheel: Wheel) -> None:
    """The package's sources, one library per tile of the report, the manifest, and nothing else."""
    files = [name for name in wheel.archive.namelist() if not name.endswith("/")]
    expect(len(files) == len(set(files)), "a file is in it twice")
    package = ROOT / "python" / "mxfp4_moe"
    sources = [path for pattern in ("**/*.py", "probe/*.toml", "tuned/*.json") for path in package.glob(pattern)]
    python = {f"mxfp4_moe/{path.relative_to(package)}" for path in sources}
    data = {f"mxfp4_moe/{name}" for name in ("py.typed", REPORT_NAME, tiles.MANIFEST_NAME)}
    entries = [*wheel.report["tiles"].values(), wheel.report[MOE_MODULE]]
    libraries = {f"mxfp4_moe/{entry['library']['file']}": entry["library"] for entry in entries}
    expected = python | data | set(libraries)
    there = {name for name in files if not name.startswith(f"{wheel.dist_info}/")}
    expect(not there - expected, f"unexpected in the wheel: {', '.join(sorted(there - expected))}")
    expect(not expected - there, f"missing from the wheel: {', '.join(sorted(expected - there))}")
    for name, library in libraries.items():
        digest = hashlib.sha256(wheel.archive.read(name)).hexdigest()
        expect(digest == library["sha256"], f"{name} is not the library that the build report describes")
    if "dev" not in wheel.version:
        wanted = [tile.name for tile in tiles.load_manifest(ROOT / tiles.MANIFEST_NAME).tiles]
        expect(list(wheel.report["tiles"]) == wanted, f"it has {len(wheel.report['tiles'])} tiles of {len(wanted)}")


def check_sbom(wheel: Wheel) -> None:
    """It describes this wheel, its libraries by their hashes, and CUTLASS under its licence."""
    data = json.loads(wheel.text(f"{wheel.dist_info}/sboms/{SBOM_NAME}"))
    about = data["metadata"]["component"]
    expect((data["bomFormat"], data["specVersion"]) == ("CycloneDX", "1.6"), f"{SBOM_NAME} is not CycloneDX 1.6")
    expect(about["version"] == wheel.version, f"{SBOM_NAME} is of version {about['version']}, not {wheel.version}")
    hashes = {part["name"]: part["hashes"][0]["content"] for part in about["components"]}
    entries = [*wheel.report["tiles"].values(), wheel.report[MOE_MODULE]]
    described = {f"mxfp4_moe/{entry['library']['file']}": entry["library"]["sha256"] for entry in entries}
    expect(hashes == described, f"{SBOM_NAME} and the build report differ about the libraries")
    parts = {part["name"]: part for part in data["components"]}
    expect("CUTLASS" in parts, f"{SBOM_NAME} does not name CUTLASS")
    cutlass = parts["CUTLASS"]
    expect(cutlass["licenses"] == [{"expression": "BSD-3-Clause"}], f"{SBOM_NAME} has no licence of CUTLASS")
    version = wheel.report["built_with"]["cutlass"]
    expect(cutlass["version"] == version, f"{SBOM_NAME} has CUTLASS {cutlass['version']}, the report {version}")


def audit(path: Path) -> str:
    """Every check; BuildError for the first that fails. Returns what was seen, as a line."""
    refuse_emulated(path)
    with zipfile.ZipFile(path) as archive:
        wheel = open_wheel(path, archive)
        for check in (check_version, check_metadata, check_contents, check_sbom):
            check(wheel)
    thresholds = load_thresholds()
    profile = wheel.report["profile"]
    check_wheel(path, profile, thresholds)
    return (
        f"{path.name}: {len(wheel.report['tiles'])} tiles, {path.stat().st_size:,} bytes of at most "
        f"{thresholds.wheel_bytes[profile]:,}, metadata and bill of materials in order"
    )


if __name__ == "__main__":
    try:
        print(audit(Path(sys.argv[1])))
    except BuildError as error:
        sys.exit(f"error: {Path(sys.argv[1]).name}: {error}")
