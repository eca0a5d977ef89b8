"""Folders whose names a shell would misread, reached through links of plain names.

nvcc writes its steps as lines for a shell, cuts -Xcompiler at commas, and compilers list headers for ninja in make's
syntax. A space, comma, quote, parenthesis or colon in a path ends up in one of the three. So compilers only get plain
paths: one that is plain stays as it is, and the part of any other that is not plain, such as `/home/me/my projects`,
is replaced by a link in the build's folder. Everything else is relative to the source tree, whatever its own path is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from wheelbuild import ROOT, BuildError

_PLAIN = re.compile(r"[A-Za-z0-9_./+-]*")
_NOT_QUOTED = re.compile(r"[$`\\\n]")  # what a shell still reads inside of double quotes


class PlainPaths:
    """Pure: `links` says what must be there before a path is used."""

    def __init__(self, folder: Path) -> None:
        """`folder`: relative to the source tree, for the links."""
        self._folder = folder
        self.links: dict[Path, Path] = {}  # link -> where it leads

    def __call__(self, path: Path) -> Path:
        """The path, with the part that is not plain behind a link."""
        odd = [i for i, part in enumerate(path.parts) if not _PLAIN.fullmatch(part)]
        if not odd:
            return path
        target = Path(*path.parts[: odd[-1] + 1])
        link = self._folder / hashlib.sha256(os.fsencode(target)).hexdigest()[:8]
        self.links[link] = target
        return link.joinpath(*path.parts[odd[-1] + 1 :])


def make_links(links: Mapping[Path, Path], root: Path) -> None:
    """Makes the links that are not there; a relative path's folder is `root`."""
    for link, target in links.items():
        place = root / link
        if place.is_symlink() and Path(os.readlink(place)) == target:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)


def require_quotable(root: Path = ROOT) -> None:
    """BuildError for a source tree whose own path nvcc cannot quote: it names every source absolutely, once."""
    if found := _NOT_QUOTED.search(str(root)):
        raise BuildError(
            f"the source tree is in {str(root)!r}, and nvcc hands that path to a shell, which would not take "
            f"{found[0]!r} as it is: build in a folder without dollar signs, backquotes, backslashes and line breaks"
        )
