"""docs/troubleshooting.md: each message that a user may meet, what it means, and what to do.

`python -m wheelbuild.docs.troubleshooting` writes it, from the package's _install/troubles.py; `--check` says whether
it is current.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from wheelbuild import ROOT, tile_model

if TYPE_CHECKING:
    from mxfp4_moe._install import troubles
else:  # by path, as tile_model.py loads `tiles`: the package need not be installed
    import importlib

    troubles = importlib.import_module(f"{tile_model.archs.__package__}._install.troubles")

DOCUMENT = Path("docs/troubleshooting.md")
EXAMPLE = troubles.Versions(wheel_cuda="13.0", torch_cuda="12.8")

INTRODUCTION = """# Troubleshooting

Written by `python -m wheelbuild.docs.troubleshooting` from `_install/troubles.py`; a test keeps it current.

Begin with

```
mxfp4-moe doctor --verify      # what is installed, what does not fit, and the next step for each; changes nothing
mxfp4-moe doctor --selftest    # with a GPU: every tile against the reference
```

It works without torch, without a GPU and with a broken install (`python -m mxfp4_moe.cli doctor` where the command is
not on the PATH). Exit status 0 is well, 1 a warning, 2 an error; `--json` is for machines. Paste what it prints into an
issue.

Errors below reach you as one sentence: what could not be done, the message in parentheses, what it means, what to do,
and the versions that are here. The original exception is its `__cause__`. The numbers are those of a wheel for CUDA 13
beside a torch for CUDA 12.

## Warnings and refusals of mxfp4-moe itself

| Message | What it means | What to do |
|---|---|---|
"""


def _paragraph(text: str) -> str:
    return textwrap.fill(text, width=120, break_long_words=False, break_on_hyphens=False)


def document() -> str:
    """The text of docs/troubleshooting.md."""
    parts = [INTRODUCTION]
    parts += [f"| `{own.message}` | {own.means} | {own.remedy} |\n" for own in troubles.OWN_MESSAGES]
    for trouble in troubles.TROUBLES:
        means, remedy = trouble.words(EXAMPLE)
        messages = "\n".join(trouble.examples)
        parts.append(f"\n## {trouble.name[0].upper()}{trouble.name[1:]}\n\n```\n{messages}\n```\n\n")
        parts.append(f"{_paragraph(f'What it means: {means}.')}\n\n{_paragraph(f'What to do: {remedy}.')}\n")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"only say whether {DOCUMENT} is current")
    path, text = ROOT / DOCUMENT, document()
    if not parser.parse_args().check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{DOCUMENT} is not current: python -m wheelbuild.docs.troubleshooting", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
