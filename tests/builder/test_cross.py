"""Building for another platform, without a cross compiler: platforms, target, make_target, cubins, cross_check.

ci/build-aarch64.sh does it in earnest: it builds the wheel and runs it under emulation, which takes minutes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from release_tools import tool

import mxfp4_moe
from mxfp4_moe._install import wheel
from wheelbuild import ROOT, BuildError
from wheelbuild.cubins import read_cubins, require_same_cubins
from wheelbuild.make_target import CUDA_PACKAGES, apt_options, make_target, requirements
from wheelbuild.plan import CompileJob, Plan, plan
from wheelbuild.platforms import PLATFORMS
from wheelbuild.release.cross_check import (
    WheelFile,
    check_cubins,
    check_machines,
    check_same_files,
    elf_machine,
    read_files,
)
from wheelbuild.release.repair import auditwheel_command
from wheelbuild.settings import Settings, read_settings
from wheelbuild.target import Target, find_target, require_tools
from wheelbuild.thresholds import Thresholds
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import Cuda, Headers, Toolchain, Torch, package_dirs, resolve_cross_toolchain, resolve_cuda

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")
X86_64, AARCH64 = PLATFORMS["linux_x86_64"], PLATFORMS["linux_aarch64"]
MOE_SOURCES = [Path("csrc/moe/route.cu"), Path("csrc/moe/operators.cpp")]
THRESHOLDS = Thresholds(instructions_per_mma={}, peak_mb=2000, wheel_bytes={"full": 12_000_000})
EXTENSIONS = Path(mxfp4_moe.__file__).parent / "_ext"


def settings(host: str = "linux_x86_64", **env: str) -> Settings:
    return read_settings(env, MANIFEST, host)


def toolchain(prefix: str, cxx: str, target_python: tuple[str, ...] = ()) -> Toolchain:
    """CUDA, torch and Python under `prefix`, the compilers and CUTLASS where they always are."""
    return Toolchain(
        cuda=Cuda(
            origin="packages",
            version=(13, 0, 88),
            nvcc=Path("/cuda/bin/nvcc"),
            include_dirs=(Path(f"{prefix}/cuda/include"), Path(f"{prefix}/cuda/include/cccl")),
            cudart=Path(f"{prefix}/cuda/lib/libcudart.so.13"),
            cuobjdump=Path("/cuda/bin/cuobjdump"),
        ),
        cutlass=Headers(version="4.2.0", include_dirs=(Path("/cutlass/include"),)),
        torch=Torch(version="2.13.0", include_dirs=(Path("/torch/include"),), library_dir=Path(f"{prefix}/torch/lib")),
        python=Headers(version="3.11", include_dirs=(Path(f"{prefix}/python/include"),)),
        cxx=Path(cxx),
        cxx_version="g++ 12",
        target_python=target_python,
    )


def make_plan(chosen: Settings, tools: Toolchain) -> Plan:
    return plan(chosen, tools, THRESHOLDS, MOE_SOURCES, Path("build/x/ninja"))


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLATFORMS)
def test_without_being_asked_the_build_is_for_the_machine_that_builds(name: str) -> None:
    chosen = settings(name)
    assert (chosen.platform, chosen.cross) == (PLATFORMS[name], False)
    assert chosen == settings(name, MXFP4_MOE_PLATFORM=name)
    assert chosen.build_folder("cu130") == "full-cu130"
    assert chosen.wheel_options() == {}


def test_a_cross_build_has_its_own_folder_and_tag_and_the_same_version() -> None:
    chosen = settings(MXFP4_MOE_PLATFORM="linux_aarch64")
    assert (chosen.platform, chosen.cross) == (AARCH64, True)
    assert chosen.wheel_options() == {"plat_name": "linux_aarch64"}
    assert chosen.local("cu130") == settings().local("cu130")
    builds = [
        settings(**platform, **tile)
        for platform in ({}, {"MXFP4_MOE_PLATFORM": "linux_aarch64"})
        for tile in ({}, {"MXFP4_MOE_TILES": "m128n128"})
    ]
    assert len({build.build_folder("cu130") for build in builds}) == len(builds)


@pytest.mark.parametrize(
    ("host", "name", "sentence"),
    [
        ("linux_x86_64", "aarch64", "wheels are built for linux_x86_64, linux_aarch64, not for 'aarch64'"),
        ("macosx_14_0_arm64", "", "wheels are built for linux_x86_64, linux_aarch64, not for 'macosx_14_0_arm64'"),
        ("linux_aarch64", "linux_x86_64", "linux_x86_64 is built on itself, and this machine is linux_aarch64"),
        (
            "linux_riscv64",
            "linux_aarch64",
            "linux_aarch64 is built on itself or on linux_x86_64, and this machine is linux_riscv64",
        ),
    ],
)
def test_what_cannot_be_built_here_is_refused(host: str, name: str, sentence: str) -> None:
    with pytest.raises(BuildError) as error:
        settings(host, MXFP4_MOE_PLATFORM=name)
    assert str(error.value) == f"MXFP4_MOE_PLATFORM: {sentence}"


# ---- plan ------------------------------------------------------------------------------------------------------------

NATIVE = make_plan(settings(), toolchain("/native", "/usr/bin/g++"))
CROSS = make_plan(
    settings(MXFP4_MOE_PLATFORM="linux_aarch64"),
    toolchain("/target", "/usr/bin/aarch64-linux-gnu-g++", ("qemu-aarch64", "/target/python")),
)


def pairs() -> list[tuple[CompileJob, CompileJob]]:
    return list(zip(NATIVE.jobs, CROSS.jobs, strict=True))


def test_a_cross_build_makes_the_same_files() -> None:
    for native, cross in pairs():
        assert (native.name, native.kind, native.inputs, native.output) == (
            cross.name,
            cross.kind,
            cross.inputs,
            cross.output,
        )


def test_the_host_compiler_is_the_cross_compiler_everywhere() -> None:
    for job in CROSS.jobs:
        if job.kind == "nvcc":
            assert job.command[0] == "/cuda/bin/nvcc"
            assert job.command[job.command.index("-ccbin") + 1] == "/usr/bin/aarch64-linux-gnu-g++"
        if job.kind in ("cxx", "link"):
            assert job.command[0] == "/usr/bin/aarch64-linux-gnu-g++"


def test_nvcc_finds_the_platforms_cuda_headers_before_its_own() -> None:
    for native, cross in pairs():
        if native.kind == "nvcc":
            assert cross.command[cross.command.index("/target/cuda/include") - 1] == "-I"
            assert cross.command[cross.command.index("/target/cuda/include/cccl") - 1] == "-isystem"
            assert not [word for word in native.command if word.startswith("/native")], "nvcc's own are right"


def test_nothing_else_differs_but_where_things_are() -> None:
    added = ("-I", "/target/cuda/include", "-isystem", "/target/cuda/include/cccl")
    for native, cross in pairs():
        words = list(cross.command)
        if cross.kind == "nvcc":
            start = words.index(added[1]) - 1
            assert tuple(words[start : start + 4]) == added
            del words[start : start + 4]
        if cross.kind == "load":
            assert words[:2] == ["qemu-aarch64", "/target/python"]
            words[:2] = [native.command[0]]
        moved = [word.replace("/target", "/native").replace("aarch64-linux-gnu-g++", "g++") for word in words]
        assert tuple(moved) == native.command


# ---- the platform's environment --------------------------------------------------------------------------------------


def install_packages(folder: Path, versions: Mapping[str, str]) -> Path:
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return folder


def test_its_packages_have_the_versions_that_compile_here(tmp_path: Path) -> None:
    site = install_packages(
        tmp_path / "1", {name: f"13.{i}.7" for i, name in enumerate(CUDA_PACKAGES)} | {"other": "1"}
    )
    hidden = install_packages(tmp_path / "2", dict.fromkeys(CUDA_PACKAGES, "13.9.9"))
    assert requirements([site, hidden], (2, 10)) == [
        "torch==2.10.*",
        "nvidia-cuda-runtime==13.0.7",
        "nvidia-cuda-crt==13.1.7",
        "nvidia-cuda-cccl==13.2.7",
    ]


def test_without_cudas_packages_here_there_is_no_other_platforms(tmp_path: Path) -> None:
    site = install_packages(tmp_path, {"nvidia-cuda-runtime": "13.0.7"})
    with pytest.raises(BuildError, match="^nvidia-cuda-crt, nvidia-cuda-cccl is not installed here, .*run ci/build.sh"):
        requirements([site], (2, 10))


def test_apt_is_kept_to_its_folder(tmp_path: Path) -> None:
    words = apt_options(tmp_path, AARCH64)
    values = dict(word.split("=", 1) for word in words[1::2])
    assert set(words[::2]) == {"-o"}
    assert values["APT::Architecture"] == "arm64"
    folders = [value for name, value in values.items() if name.startswith("Dir::")]
    assert len(folders) == 3
    assert all(Path(folder).is_relative_to(tmp_path) for folder in folders)


def test_missing_tools_are_named_with_the_packages_that_have_them(tmp_path: Path) -> None:
    install = "on Debian or Ubuntu, apt-get install g\\+\\+-aarch64-linux-gnu qemu-user$"
    with pytest.raises(BuildError, match=f"^aarch64-linux-gnu-g\\+\\+ and qemu-aarch64: not on PATH, .*; {install}"):
        require_tools({"PATH": str(tmp_path)}, AARCH64)
    (tmp_path / "aarch64-linux-gnu-g++").touch(mode=0o755)
    with pytest.raises(BuildError, match=f"^qemu-aarch64: not on PATH, .*; {install}"):
        require_tools({"PATH": str(tmp_path)}, AARCH64)
    (tmp_path / "qemu-aarch64").touch(mode=0o755)
    assert require_tools({"PATH": str(tmp_path)}, AARCH64) == tmp_path / "aarch64-linux-gnu-g++"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\nset -e\n{text}", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose apt-get, dpkg-deb, cross compiler and qemu only pretend; `log` has the commands, one per line."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    log = f'echo "${{0##*/}} $*" >>{tmp_path}/log\n'
    cache = "for word; do case $word in Dir::Cache=*) cache=${word#*=};; esac; done\n"
    script(bin_folder / "apt-get", log + cache + "touch $cache/archives/python3.12_arm64.deb\n")
    script(bin_folder / "dpkg-deb", log + "mkdir -p $3/usr/bin $3/usr/include; touch $3/usr/bin/python3.12\n")
    script(bin_folder / "qemu-aarch64", log + 'for last; do :; done\ncase "$*" in *-m\\ venv*) mkdir $last;; esac\n')
    script(bin_folder / "aarch64-linux-gnu-g++", 'echo "aarch64-linux-gnu-g++ 12"\n')
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("MXFP4_MOE_TARGET", str(tmp_path / "target"))
    return tmp_path


def commands(machine: Path) -> list[str]:
    return (machine / "log").read_text(encoding="utf-8").splitlines()


def test_the_environment_is_made_once(machine: Path) -> None:
    made = make_target(os.environ, AARCH64, ["torch==2.10.*"])
    assert made == Target(platform=AARCH64, folder=machine / "target", python_version="3.12")
    assert find_target(os.environ, AARCH64) == made
    first = commands(machine)
    assert [line.split()[0] for line in first] == ["apt-get", "apt-get", "dpkg-deb", "qemu-aarch64", "qemu-aarch64"]
    assert first[1].endswith("install python3 libpython3-dev libstdc++6")
    assert f"-E PYTHONPATH={machine / 'target' / 'pip'} " in first[-1], "pip, and nothing else of this machine's"
    assert first[-1].endswith("-m pip install --no-compile --progress-bar off --only-binary :all: torch==2.10.*")
    make_target(os.environ, AARCH64, ["torch==2.10.*"])
    assert commands(machine) == first
    make_target(os.environ, AARCH64, ["torch==2.11.*"])
    assert len(commands(machine)) == 2 * len(first)


def test_a_failure_is_one_sentence_and_leaves_nothing_that_looks_made(machine: Path) -> None:
    script(machine / "bin" / "apt-get", "echo E: no arm64 here\nexit 100\n")
    sentence = (
        "^apt-get failed .E: no arm64 here.: aarch64 wheels are built on Debian or Ubuntu, with apt sources that "
    )
    with pytest.raises(BuildError, match=sentence):
        make_target(os.environ, AARCH64, ["torch==2.10.*"])
    with pytest.raises(BuildError, match=r"target has no Python, torch and CUDA of aarch64: run ci/build-aarch64\.sh"):
        find_target(os.environ, AARCH64)


def test_a_folder_with_other_things_is_left_alone(machine: Path) -> None:
    (machine / "target").mkdir()
    (machine / "target" / "thesis.tex").touch()
    with pytest.raises(BuildError, match="target holds something else: let MXFP4_MOE_TARGET name a folder of its own"):
        make_target(os.environ, AARCH64, ["torch==2.10.*"])
    assert [path.name for path in (machine / "target").iterdir()] == ["thesis.tex"]


def test_its_python_sees_this_tree_and_no_other_module_of_this_machine() -> None:
    target = Target(platform=AARCH64, folder=Path("/t"), python_version="3.12")
    assert target.python == (
        *("qemu-aarch64", "-L", "/t/root", "-E", f"PYTHONPATH={ROOT}", "-E", "PYTHONNOUSERSITE=1"),
        "/t/venv/bin/python",
    )


def test_a_cross_toolchain_has_compilers_from_here_and_the_rest_from_there(machine: Path) -> None:
    def touch(*paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    site = machine / "env" / "lib" / "python3.12" / "site-packages"
    cuda = site / "nvidia" / "cu13"
    touch(cuda / "include" / "cccl" / "x", cuda / "lib" / "libcudart.so.13", cuda / "bin" / "cuobjdump")
    script(cuda / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    touch(site / "cutlass_library" / "source" / "include" / "cutlass" / "cutlass.h", site / "torch" / "version.py")
    (site / "torch" / "version.py").write_text("__version__ = '2.13.0+cpu'\n", encoding="utf-8")
    env = {"CUDA_HOME": str(cuda), "MXFP4_MOE_BUILD_ENV": str(machine / "env")}
    env |= {name: os.environ[name] for name in ("PATH", "MXFP4_MOE_TARGET")}

    target = make_target(env, AARCH64, [])
    with pytest.raises(
        BuildError, match=r"^.*/nvcc is of CUDA 13, and .*target has no libcudart\.so\.13: run ci/build-a"
    ):
        resolve_cross_toolchain(env, MANIFEST.archs, AARCH64)
    touch(target.cuda(13) / "lib" / "libcudart.so.13")
    found = resolve_cross_toolchain(env, MANIFEST.archs, AARCH64)
    assert found.cuda.nvcc == cuda / "bin" / "nvcc"
    assert found.cuda.include_dirs == (target.cuda(13) / "include", target.cuda(13) / "include" / "cccl")
    assert found.cuda.cudart == target.cuda(13) / "lib" / "libcudart.so.13"
    assert found.torch.library_dir == target.packages / "torch" / "lib"
    assert found.python == Headers(version="3.12", include_dirs=target.python_include_dirs)
    assert (found.cxx.name, found.cxx_version) == ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++ 12")
    assert found.target_python == target.python


# ---- checks of a wheel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "platform", "glibc"),
    [
        ("linux_aarch64", AARCH64, "not promised"),
        ("manylinux_2_34_aarch64", AARCH64, "2.34"),
        ("manylinux_2_27_x86_64.manylinux_2_28_x86_64", X86_64, "2.27"),
    ],
)
def test_a_wheels_name_says_its_platform(tag: str, platform: object, glibc: str) -> None:
    wheel = WheelFile(path=Path(f"dist/mxfp4_moe-0.1.0+cu130-cp310-abi3-{tag}.whl"))
    assert (wheel.tag, wheel.platform, wheel.glibc) == (tag, platform, glibc)


def test_a_wheel_of_no_platform_of_ours_is_refused() -> None:
    with pytest.raises(BuildError, match="its platform any is none of linux_x86_64, linux_aarch64"):
        _ = WheelFile(path=Path("mxfp4_moe-0.1.0-py3-none-any.whl")).platform


def elf(machine: int) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, machine) + bytes(44)


def test_one_library_of_another_machine_is_found() -> None:
    files = {"a.so": elf(183), "a.py": b"print()", "empty": b""}
    assert [elf_machine(data) for data in files.values()] == [183, None, None]
    assert check_machines(files, AARCH64) == 1
    with pytest.raises(BuildError, match=r"^b\.so is for ELF machine 62, expected 183 \(aarch64\)$"):
        check_machines(files | {"b.so": elf(62)}, AARCH64)
    with pytest.raises(BuildError, match="the wheel has no library for aarch64"):
        check_machines({"a.py": b""}, AARCH64)


def test_both_wheels_have_the_same_files_and_the_same_python() -> None:
    files = {"a.so": b"1", "a.py": b"2"}
    assert check_same_files(files, files | {"a.so": b"of another machine"}) == 2
    with pytest.raises(BuildError, match=r"^b\.so: in one of both wheels only"):
        check_same_files(files, files | {"b.so": b""})
    with pytest.raises(BuildError, match=r"^a\.py is not the same in both wheels"):
        check_same_files(files, files | {"a.py": b"3"})


def test_one_differing_cubin_is_named() -> None:
    cubins = {"tile.1.sm_90a.cubin": "a", "tile.2.sm_120.cubin": "b"}
    require_same_cubins("tile.abi3.so", cubins, dict(cubins))
    with pytest.raises(
        BuildError, match=r"^tile\.abi3\.so: tile\.2\.sm_120\.cubin differs, but both builds are of one"
    ):
        require_same_cubins("tile.abi3.so", cubins, cubins | {"tile.2.sm_120.cubin": "c"})
    with pytest.raises(BuildError, match=r"tile\.1\.sm_90a\.cubin is in one build only"):
        require_same_cubins("tile.abi3.so", {"tile.2.sm_120.cubin": "b"}, cubins)


@pytest.mark.parametrize("machine", [platform.machine for platform in PLATFORMS.values()])
def test_auditwheel_tags_wheels_for_every_machine(machine: str) -> None:
    """By itself it knows the tags of the machine that it runs on only, and refuses the others'."""
    program, *options = auditwheel_command(machine)
    assert f"- manylinux_2_28_{machine}" in tool(Path(program).name, *options, "repair", "--help")


# ---- and of the installed wheel's own libraries ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return resolve_cuda(os.environ, package_dirs(os.environ), MANIFEST.archs)


def kernels_of(tile: tiles.Tile) -> int:
    """The kernels that the installed wheel has of a tile."""
    return len(wheel.kernels(tile))


def test_cubins_are_those_of_every_arch_and_tell_tiles_apart(cuda: Cuda, tmp_path: Path) -> None:
    first, second = (EXTENSIONS / f"{tile.module}.abi3.so" for tile in MANIFEST.tiles[:2])
    cubins = read_cubins(cuda.cuobjdump, first)
    assert len(cubins) == kernels_of(MANIFEST.tiles[0])
    assert cubins == read_cubins(cuda.cuobjdump, first)
    assert set(cubins.values()).isdisjoint(read_cubins(cuda.cuobjdump, second).values())
    nothing = tmp_path / "nothing.so"
    nothing.write_bytes(elf(183))
    with pytest.raises(BuildError, match=r"^nothing\.so has no machine code that cuobjdump can extract"):
        read_cubins(cuda.cuobjdump, nothing)


def test_machine_code_that_differs_between_two_wheels_is_found(cuda: Cuda, tmp_path: Path) -> None:
    """The very comparison that ci/build-aarch64.sh makes, of two unpacked wheels with one library each."""
    first, second = (EXTENSIONS / f"{tile.module}.abi3.so" for tile in MANIFEST.tiles[:2])
    ours, native = (tmp_path / name / "mxfp4_moe" / "_ext" for name in ("ours", "native"))
    for folder in (ours, native):
        folder.mkdir(parents=True)
        (folder / first.name).write_bytes(first.read_bytes())
    assert check_cubins(tmp_path / "ours", tmp_path / "native", cuda.cuobjdump) == kernels_of(MANIFEST.tiles[0])
    (ours / first.name).write_bytes(second.read_bytes())
    with pytest.raises(BuildError, match=rf"^{first.name}: .*\.cubin differs"):
        check_cubins(tmp_path / "ours", tmp_path / "native", cuda.cuobjdump)


def test_this_wheel_is_no_wheel_for_another_machine(tmp_path: Path) -> None:
    if not (named := os.environ.get("MXFP4_MOE_WHEEL")):
        named = str(max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime))
    wheel = WheelFile(path=Path(named))
    files = read_files(wheel.unpack(tmp_path))
    assert check_machines(files, wheel.platform) == len(MANIFEST.tiles) + 1
    (other,) = (platform for platform in PLATFORMS.values() if platform != wheel.platform)
    with pytest.raises(BuildError, match=r"is for ELF machine \d+, expected \d+"):
        check_machines(files, other)
