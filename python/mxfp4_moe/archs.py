"""Archs: which flag to build with for a GPU, which machine code runs on it, and which CUDA release can make it.

An arch is what follows `sm_`: a compute capability and a suffix. Suffix 'a' (architecture specific) binds machine code
to one capability, 'f' (family specific) to it and the later members of its family, no suffix to it and the later ones
of its major version (CUDA programming guide, "Feature sets"). The tile kernel needs a suffix: docs/architectures.md
has the measured table, and tests hold this file against the assemblers that it was measured with.

Standard library alone: the wheel's build imports this before the package exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, int]

# The first CUDA release that assembles the tile kernel for an arch, in the order in which archs are preferred: one
# sm_120f cubin serves SM120 and SM121. sm_90a itself is older, but tensor copies to .shared::cta came with 12.8 (PTX
# ISA 8.6); SM121 and all family suffixes came with 12.9.
_OLDEST_CUDA: dict[str, Version] = {
    "90a": (12, 8),
    "120f": (12, 9),
    "121f": (12, 9),
    "120a": (12, 8),
    "121a": (12, 9),
}
ARCHS = tuple(_OLDEST_CUDA)
_CAPABILITIES: tuple[Version, ...] = ((9, 0), (12, 0), (12, 1))


class ArchError(ValueError):
    """An arch, a GPU or a CUDA release that the kernel cannot be built for; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ArchRule:
    """How to serve one GPU with one CUDA release.

    `flag` is what to build with (`-gencode arch=compute_<flag>,code=sm_<flag>`). `cubins` are all archs, the flag
    first, that this CUDA can make and whose machine code runs on the GPU.
    """

    flag: str
    cubins: tuple[str, ...]


def build_rule(capability: Version, cuda: Version) -> ArchRule:
    """The flag for a GPU's compute capability and a CUDA release, such as ((12, 1), (13, 0)) -> '120f'.

    Raises:
        ArchError: the kernel has no path for the GPU, or the CUDA release is too old for it.
    """
    if capability not in _CAPABILITIES:
        known = " and ".join([", ".join(map(_dotted, _CAPABILITIES[:-1])), _dotted(_CAPABILITIES[-1])])
        raise ArchError(f"compute capability {_dotted(capability)}: the kernel has code for {known}")
    serving = [arch for arch in ARCHS if arch_runs_on(arch, capability)]
    cubins = tuple(arch for arch in serving if oldest_cuda(arch) <= cuda)
    if not cubins:
        raise ArchError(
            f"CUDA {_dotted(cuda)} is too old to build for compute capability {_dotted(capability)}, which needs CUDA "
            f"{_dotted(min(map(oldest_cuda, serving)))} or newer"
        )
    return ArchRule(flag=cubins[0], cubins=cubins)


def arch_runs_on(arch: str, capability: Version) -> bool:
    """Whether machine code for `arch` runs on a GPU of this compute capability, e.g. '120f' on (12, 1)."""
    major, minor, suffix = check_arch(arch)
    if suffix == "f":
        return capability[0] == major and capability[1] >= minor
    return capability == (major, minor)


def oldest_cuda(arch: str) -> Version:
    """The first CUDA release whose assembler takes the kernel for `arch`."""
    check_arch(arch)
    return _OLDEST_CUDA[arch]


def check_arch(arch: str) -> tuple[int, int, str]:
    """Major, minor and suffix of an arch that the kernel can be built for, such as (12, 0, 'f') of '120f'.

    Raises:
        ArchError: there is no such arch, or the kernel has no code for it.
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
    if match is None:
        raise ArchError(f"arch {arch!r}: expected digits and a suffix, such as '90a' or '120f'")
    if arch not in ARCHS:
        raise ArchError(
            f"arch {arch!r}: the kernel has an MMA for {', '.join(ARCHS)} (block-scaled MMA does not exist under the "
            "plain suffix)"
        )
    return int(match[1]), int(match[2]), match[3]


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
