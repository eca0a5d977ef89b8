"""What a release came to: `python -m wheelbuild.release.table WHEEL BUILD_SECONDS ALL_SECONDS ...`.

In the tools' environment, which can read symbols.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from wheelbuild.release.repair import wheel_versions
from wheelbuild.report import REPORT_NAME, aligned

COLUMNS = ("version", "bytes", "tag", "glibc", "libstdc++", "torch", "tiles", "build s", "all s")


def row(path: Path, build_seconds: str, all_seconds: str) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        report = json.loads(archive.read(f"mxfp4_moe/{REPORT_NAME}"))
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        required = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    (torch,) = [match[1] for line in required if (match := re.fullmatch(r"torch(\S+)", line))]
    floors = {name: version.partition("_")[2] for name, (version, _) in wheel_versions(path).items()}
    tag = path.name.split("-abi3-")[1].removesuffix(".whl")
    size = f"{path.stat().st_size:,}"
    glibc, cxx = floors["GLIBC"], floors["GLIBCXX"]
    return [report["version"], size, tag, glibc, cxx, torch, str(len(report["tiles"])), build_seconds, all_seconds]


def main(words: Sequence[str]) -> None:
    rows = [row(Path(words[place]), words[place + 1], words[place + 2]) for place in range(0, len(words), 3)]
    print("\n".join(aligned([list(COLUMNS), *rows], left=3)))


if __name__ == "__main__":
    main(sys.argv[1:])
