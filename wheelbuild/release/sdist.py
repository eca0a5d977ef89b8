"""The source distribution: `python -m wheelbuild.release.sdist FOLDER`, in the tools' environment, makes and checks it.

The same commit gives the same bytes: entries in order, with one time (SOURCE_DATE_EPOCH), one mode and one owner.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from wheelbuild import ROOT, BuildError

ADDED = ("PKG-INFO", "setup.cfg", "python/mxfp4_moe.egg-info/")  # by setuptools


def compare(packed: set[str], known: set[str]) -> None:
    """BuildError when the files of the sdist are not those that git knows, and ADDED."""
    if missing := sorted(known - packed):
        raise BuildError(f"not in the sdist, and git knows it (MANIFEST.in): {', '.join(missing)}")
    if others := sorted(name for name in packed - known if not name.startswith(ADDED)):
        raise BuildError(f"in the sdist, and git does not know it (MANIFEST.in): {', '.join(others)}")


def normalized(data: bytes, epoch: int) -> bytes:
    """The same archive, with nothing in it of who packed it and when."""
    made = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as before,
        gzip.GzipFile(filename="", fileobj=made, mode="wb", mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in sorted(before.getmembers(), key=lambda member: member.name):
            if not member.isfile():
                continue
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.name.endswith(".sh") else 0o644
            member.pax_headers = {}
            after.addfile(member, before.extractfile(member))
    return made.getvalue()


def make_sdist(folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as made:
        command = [
            sys.executable,
            *"-m build --sdist --no-isolation --skip-dependency-check".split(),
            "--outdir",
            made,
            str(ROOT),
        ]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(f"python -m build --sdist failed: {result.stdout[-2000:]}")
        (path,) = Path(made).glob("*.tar.gz")
        data = normalized(path.read_bytes(), int(os.environ["SOURCE_DATE_EPOCH"]))
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / path.name
        target.write_bytes(data)
    return target


def names(path: Path) -> set[str]:
    """The archive's files, without the folder that holds them all."""
    with tarfile.open(path) as archive:
        return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}


def main(folder: Path) -> None:
    path = make_sdist(folder)
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        compare(names(path), set(listed.stdout.splitlines()))
    print(f"{path}: {len(names(path))} files, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BuildError as error:
        sys.exit(f"error: {error}")
