"""Whether a git tag names the version that would be published: `python -m wheelbuild.release.tag v0.1.0`."""

from __future__ import annotations

import re
import sys

from wheelbuild import ROOT, BuildError


def source_version() -> str:
    """setup.py's VERSION, where the version is written."""
    match = re.search(r'^VERSION = "([^"]+)"$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None
    return match[1]


def check_tag(tag: str, version: str, changelog: str) -> None:
    """BuildError when the tag is not v and the version, or the changelog has no section for it."""
    if tag != f"v{version}":
        raise BuildError(f"the tag is {tag} and setup.py's version {version}: expected the tag v{version}")
    if not re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE):
        raise BuildError(f"CHANGELOG.md has no section '## {version}'")


if __name__ == "__main__":
    try:
        check_tag(sys.argv[1], source_version(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    except BuildError as error:
        sys.exit(f"error: {error}")
