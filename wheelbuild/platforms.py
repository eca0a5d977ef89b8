"""The platforms that wheels are built for, by their names in wheel tags."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Platform:
    name: str  # as in a wheel's tag
    machine: str  # as in `uname -m` and in a manylinux tag
    elf_machine: int  # e_machine of its libraries (elf.h)
    debian: str  # Debian's name of the architecture
    cross_from: str | None = None  # the platform that can build for it without being it

    @property
    def cxx(self) -> str:
        """The cross compiler's name, as Debian has it."""
        return f"{self.machine}-linux-gnu-g++"

    @property
    def emulator(self) -> str:
        """The program that runs this platform's programs elsewhere."""
        return f"qemu-{self.machine}"

    @property
    def packages(self) -> tuple[str, ...]:
        """What to install, by Debian's names, to build for it elsewhere."""
        return f"g++-{self.machine}-linux-gnu", "qemu-user"


PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform(name="linux_x86_64", machine="x86_64", elf_machine=62, debian="amd64"),
        Platform(name="linux_aarch64", machine="aarch64", elf_machine=183, debian="arm64", cross_from="linux_x86_64"),
    )
}


def host_platform() -> str:
    """This machine's name in wheel tags, e.g. linux_x86_64."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
