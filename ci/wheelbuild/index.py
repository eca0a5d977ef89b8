"""A package index of static files, one per CUDA label: `python -m wheelbuild.index FOLDER OUTPUT`.

FOLDER holds wheels of any number of releases, labels and platforms (and sdists), searched with its subfolders; OUTPUT
becomes a site that any web server can show:

    index.html                          the labels, for people
    cu130/index.html, index.json        the projects of this label: one
    cu130/mxfp4-moe/index.html, .json   its files (PEP 503 and PEP 691) with hashes and Requires-Python
    cu130/mxfp4-moe/*.whl, *.metadata   the wheels, and their METADATA by itself (PEP 658)
    SHA256SUMS                          of everything that can be downloaded

A wheel's label is its local version. Wheels with a name of their own (mxfp4-moe-cu13) are for PyPI and left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import Parser
from html import escape
from pathlib import Path
from urllib.parse import quote

from wheelbuild import BuildError
from wheelbuild.emulation import refuse_emulated
from wheelbuild.settings import NAME

_WHEEL = re.compile(r"mxfp4_moe-(?P<version>[^-+]+)\+(?P<label>cu\d+)(?P<variant>\.[^-]+)?-cp310-abi3-\w+\.whl")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="pypi:repository-version" content="1.1">
<title>{title}</title>
</head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True)
class File:
    path: Path
    version: str
    label: str
    requires_python: str
    metadata: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def metadata_sha256(self) -> str:
        return hashlib.sha256(self.metadata).hexdigest()


def read_file(path: Path) -> File | None:
    """A wheel for the index; None for one that goes elsewhere. BuildError for one that nobody should install."""
    match = _WHEEL.fullmatch(path.name)
    if match is None:
        return None
    refuse_emulated(path)
    if match["variant"]:
        raise BuildError(f"{path.name}: {match['variant'][1:]} marks a build that is not for release")
    if "-linux_" in path.name:
        raise BuildError(f"{path.name} has no manylinux tag: run ci/repair.sh first")
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name)
    return File(
        path=path,
        version=f"{match['version']}+{match['label']}",
        label=match["label"],
        requires_python=Parser().parsestr(metadata.decode())["Requires-Python"],
        metadata=metadata,
    )


def page(title: str, lines: Iterable[str]) -> str:
    return _PAGE.format(title=escape(title), body="\n".join(lines))


def links(title: str, names: Iterable[str]) -> str:
    """A page of links to folders."""
    return page(
        title, [f"<h1>{escape(title)}</h1>", *(f'<a href="{quote(name)}/">{escape(name)}</a><br>' for name in names)]
    )


def project_html(files: Sequence[File]) -> str:
    """PEP 503, with the attributes of PEP 658 and 714."""
    lines = [f"<h1>{NAME}</h1>"]
    for file in files:
        metadata = f"sha256={file.metadata_sha256}"
        attributes = {
            "href": f"{quote(file.path.name)}#sha256={file.sha256}",
            "data-requires-python": file.requires_python,
            "data-core-metadata": metadata,
            "data-dist-info-metadata": metadata,  # the attribute's older name
        }
        words = " ".join(f'{key}="{escape(value)}"' for key, value in attributes.items())
        lines.append(f"<a {words}>{escape(file.path.name)}</a><br>")
    return page(NAME, lines)


def project_json(files: Sequence[File]) -> str:
    """PEP 691 and 700."""
    data = {
        "meta": {"api-version": "1.1"},
        "name": NAME,
        "versions": sorted({file.version for file in files}),
        "files": [
            {
                "filename": file.path.name,
                "url": quote(file.path.name),
                "size": file.path.stat().st_size,
                "hashes": {"sha256": file.sha256},
                "requires-python": file.requires_python,
                "core-metadata": {"sha256": file.metadata_sha256},
                "yanked": False,
            }
            for file in files
        ],
    }
    return json.dumps(data, indent=1) + "\n"


def write_index(files: Sequence[File], output: Path) -> None:
    """The site for these files, into an empty or missing folder."""
    if not files:
        raise BuildError("no wheels for an index: expected mxfp4_moe-*+cuXXX-cp310-abi3-manylinux_*.whl")
    if output.exists() and any(output.iterdir()):
        raise BuildError(f"{output} is not empty; the index is written afresh, so that nothing old stays in it")
    labels = sorted({file.label for file in files})
    for label in labels:
        chosen = sorted((file for file in files if file.label == label), key=lambda file: file.path.name)
        names = [file.path.name for file in chosen]
        if len(names) != len(set(names)):
            raise BuildError(f"two wheels of one name for {label}: {', '.join(sorted(names))}")
        project = output / label / NAME
        project.mkdir(parents=True)
        for file in chosen:
            shutil.copyfile(file.path, project / file.path.name)
            (project / f"{file.path.name}.metadata").write_bytes(file.metadata)
        (project / "index.html").write_text(project_html(chosen), encoding="utf-8")
        (project / "index.json").write_text(project_json(chosen), encoding="utf-8")
        (output / label / "index.html").write_text(links(f"{NAME} for {label}", [NAME]), encoding="utf-8")
        projects = {"meta": {"api-version": "1.1"}, "projects": [{"name": NAME}]}
        (output / label / "index.json").write_text(json.dumps(projects, indent=1) + "\n", encoding="utf-8")
    (output / "index.html").write_text(links(f"{NAME}: wheels by CUDA version", labels), encoding="utf-8")
    sums = sorted((file.path.name, file.sha256) for file in files)
    (output / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums), encoding="utf-8")


def main(folder: Path, output: Path) -> None:
    files = [file for path in sorted(folder.rglob("*.whl")) if (file := read_file(path))]
    write_index(files, output)
    print(f"{output}: {len(files)} wheels for {', '.join(sorted({file.label for file in files}))}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except BuildError as error:
        sys.exit(f"error: {error}")
