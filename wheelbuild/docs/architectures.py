"""docs/architectures.md: what each target accepts, as measured, and what follows for the flag to build with.

`python -m wheelbuild.docs.architectures` asks the assemblers of ci/cuda-versions.json, keeps their answers in
docs/architectures.json, and writes the page from them. `--check` measures too, and says whether both are current.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wheelbuild import ROOT, BuildError
from wheelbuild.assemblers import install_all
from wheelbuild.probe_model import assemblers, kernel, matrix, run, variants
from wheelbuild.tile_model import archs
from wheelbuild.versions import load_versions

if TYPE_CHECKING:
    from mxfp4_moe.probe.assemblers import Assembler
    from mxfp4_moe.probe.matrix import Difference, Matrix

DOCUMENT = Path("docs/architectures.md")
RECORD = Path("docs/architectures.json")
COMMAND = "python -m wheelbuild.docs.architectures"

# A release before 12.9 has no family targets and no SM121: every row would need a second one to say so.
_FIRST_IN_MATRIX = (12, 9)
_GPUS = {(9, 0): "SM90: H100, H200", (12, 0): "SM120: RTX 50, RTX PRO 6000", (12, 1): "SM121: GB10 (DGX Spark)"}

INTRODUCTION = """# Architectures

Written by `{command}`; tests keep it current.
It has the answers of ptxas {toolkits} about {count} instruction variants for {target_count} targets.
With ptxas's words they are in [architectures.json](architectures.json), and `mxfp4-moe probe` asks whichever ptxas you
have. That an assembler accepts an instruction says that the target has it. It does not say that anything ran: we have
run nothing on SM12x ([README](../README.md)).

## The suffixes

A target is `sm_`, a compute capability, and a suffix. The suffix decides which instructions ptxas accepts, and on which
GPUs the machine code runs (CUDA programming guide, "Feature sets"):

- **plain** (`sm_120`): what later GPUs keep, such as `mma.sync` on f16 and FP8, TMA and mbarriers. Machine code for
  `sm_120` runs on 12.0 and 12.1. It has no block-scaled MMA, and no `setmaxnreg`.
- **`f`, family specific** (`sm_120f`, from CUDA 12.9): also what the members of a family have in common. Machine code
  for `sm_120f` runs on 12.0 and 12.1.
- **`a`, architecture specific** (`sm_90a`, `sm_120a`, `sm_121a`): also what this architecture alone has. Machine code
  for `sm_120a` runs on 12.0 only, for `sm_121a` on 12.1 only.

It is often said that the `a` suffix refuses block-scaled MMA, and that it takes `f`. That is not so: each of these
assemblers accepts it for {scaled}, and for no other target.
It is the plain suffix that refuses it, in the words of ptxas {newest}:

```
{refusal}
```

What speaks for `f` is that one cubin serves both GPUs.
"""


def measure(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The record: the answers of these assemblers about the table, and about the kernel."""
    asked = [assemblers.examine(path, "ci/cuda-versions.json") for path in paths.values()]
    in_matrix = [assembler for assembler in asked if assembler.version >= _FIRST_IN_MATRIX]
    table = variants.load()
    found = matrix.from_results(run.probe_all(in_matrix, dict.fromkeys(run.TARGETS, table)), run.TARGETS, table)
    return {**matrix.to_json(found), "kernel": _kernel(asked)}


def _kernel(asked: Sequence[Assembler]) -> dict[str, dict[str, str]]:
    """By release and target: '' where the kernel assembles, else the first instruction that does not, or 'n/a'."""
    record: dict[str, dict[str, str]] = {}
    for verdict in kernel.judge(asked, run.TARGETS):
        said = "n/a" if verdict.status is run.Status.NOT_APPLICABLE else verdict.first
        record.setdefault(verdict.assembler.label, {})[verdict.target] = said
    return record


def record_text(record: Mapping[str, Any]) -> str:
    """The record as JSON with a line per variant, so that a diff shows which answers changed."""
    rest = json.dumps({key: value for key, value in record.items() if key != "variants"}, indent=1).removesuffix("\n}")
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["variants"])
    return f'{rest},\n "variants": [\n{rows}\n ]\n}}\n'


def document(record: Mapping[str, Any]) -> str:
    """The page, from the record and the arch rules alone."""
    found = matrix.from_json(record)
    return "\n".join(
        [
            _introduction(found),
            _differences(found),
            _kernel_section(record["kernel"]),
            _rules(),
            "## The matrix\n",
            "A row that names CUDA releases is theirs alone; where none is named, all agree. yes: accepted, no:",
            "refused, -: not applicable, since that release does not read the PTX ISA version of the instruction.\n",
            matrix.markdown(found, heading="###"),
        ]
    )


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _introduction(found: Matrix) -> str:
    newest = found.toolkits[-1]
    scaled = next(variant for variant in found.variants if ".block_scale.scale_vec::1X" in variant.name)
    accepting = {tuple(found.accepted(toolkit, scaled.name)) for toolkit in found.toolkits}
    if len(accepting) != 1:
        raise BuildError(f"{scaled.name}: toolkits differ, and the page says that they agree")
    targets = _listed([f"`{target}`" for target in accepting.pop()])
    return INTRODUCTION.format(
        command=COMMAND,
        toolkits=_listed([toolkit.version for toolkit in found.toolkits]),
        count=len(found.variants),
        target_count=len(found.targets),
        scaled=targets,
        newest=newest.version,
        refusal=found.verdict(newest, "sm_120", scaled).words.replace("; ", "\n"),
    )


def _differences(found: Matrix) -> str:
    """What a suffix adds, by name; and that the toolkits agree, or where they do not."""
    newest = found.toolkits[-1]
    only = matrix.Matrix(toolkits=(newest,), targets=found.targets, variants=found.variants, verdicts=found.verdicts)
    lines = [f"What the suffixes differ in on SM12x, as ptxas {newest.version} has it:\n"]
    for more, less in (("sm_120f", "sm_120"), ("sm_120a", "sm_120f"), ("sm_121a", "sm_120a"), ("sm_121f", "sm_120f")):
        lines.append(_difference(more, less, matrix.diff_targets(only, more, less)))
    lines.append("")
    oldest = found.toolkits[0]
    changed = [
        name
        for name in dict.fromkeys(found_.variant.name for found_ in matrix.diff_toolkits(found, oldest, newest))
        if oldest.isa >= next(variant for variant in found.variants if variant.name == name).isa
    ]
    if changed:
        listed = ", ".join(f"`{name}`" for name in changed)
        lines.append(f"From ptxas {oldest.version} to {newest.version} the answer changed for {listed}.\n")
    else:
        lines.append(
            f"From ptxas {oldest.version} to {newest.version} no answer changed about anything that both can read.\n"
        )
    return "\n".join(lines)


def _difference(more: str, less: str, differences: Sequence[Difference]) -> str:
    gained = [found.variant.name for found in differences if found.first.accepted]
    lost = [found.variant.name for found in differences if not found.first.accepted]
    if not differences:
        return f"- `{more}` and `{less}`: no difference."
    parts = []
    for one, other, names in ((more, less, gained), (less, more, lost)):
        if names:
            kinds: dict[str, int] = {}
            for name in names:
                head = name.split(".")[0] + ("" if ".kind" not in name else f" {_kind(name)}")
                kinds[head] = kinds.get(head, 0) + 1
            said = ", ".join(f"{head} ({count})" for head, count in kinds.items())
            parts.append(f"`{one}` accepts {len(names)} that `{other}` refuses: {said}")
    text = f"- {'; '.join(parts)}."
    return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _kind(name: str) -> str:
    sparse = "sparse " if ".sp" in name else ""
    return sparse + next(part for part in name.split(".") if part.startswith("kind::"))


def _kernel_section(record: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        "## What the tile kernel needs\n",
        "`mxfp4-moe probe --kernel` asks about the instructions that nvcc makes of our tiles: of the SM90 path for",
        "`sm_90a`, of the SM12x path for all others. The first that a target refuses:\n",
        "| target | first refused | CUDA |",
        "| :-- | :-- | :-- |",
    ]
    targets = next(iter(record.values()))
    for target in targets:
        answers: dict[str, list[str]] = {}
        for release, by_target in record.items():
            if by_target[target] != "n/a":
                answers.setdefault(by_target[target], []).append(".".join(release.split(".")[:2]))
        for first, releases in answers.items():
            said = f"`{first}`" if first else "none: the kernel assembles"
            lines.append(f"| `{target}` | {said} | {', '.join(releases)} |")
    return "\n".join([*lines, ""])


def _rules() -> str:
    releases = [tuple(map(int, release.split(".")[:2])) for release in load_versions().assemblers]
    lines = [
        "## The flag to build with\n",
        "What `mxfp4_moe.archs.build_rule` answers: the flag, and in brackets other machine code that this CUDA can",
        "make and that runs on the GPU. Tests hold it against these assemblers.\n",
        f"| GPU | {' | '.join(f'CUDA {major}.{minor}' for major, minor in releases)} |",
        f"| :-- | {' | '.join([':--'] * len(releases))} |",
    ]
    for capability, name in _GPUS.items():
        cells = []
        for major, minor in releases:
            try:
                rule = archs.build_rule(capability, (major, minor))
                others = ", ".join(f"`{arch}`" for arch in rule.cubins[1:])
                cells.append(f"`{rule.flag}`" + (f" ({others})" if others else ""))
            except archs.ArchError:
                cells.append("too old")
        lines.append(f"| {capability[0]}.{capability[1]}, {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is not current")
    check: bool = parser.parse_args(arguments).check
    try:
        record = measure(install_all())
        text = document(record)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    contents = {RECORD: record_text(record), DOCUMENT: text}
    for path, content in contents.items():
        if not check:
            (ROOT / path).write_text(content, encoding="utf-8")
        elif (ROOT / path).read_text(encoding="utf-8") != content:
            print(f"{path} is not current: run {COMMAND}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
