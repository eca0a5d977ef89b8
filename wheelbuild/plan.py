"""From manifest, settings and toolchain to the list of jobs. Pure: nothing here looks at the disk or runs anything.

Per tile: `csrc/tile/tile.cu` once per kernel, which are an arch's for the pairs of formats of the profile,
`csrc/tile/tile_op.cpp` once, a link, a check. The `moe` extension: every
`csrc/moe/*.cu` once for all archs, every `csrc/moe/*.cpp`, a link, a check. At the end one job loads all extensions. A
job's command is the whole truth about its output: what changes it reruns that job and those after it, and nothing else.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wheelbuild import emulation
from wheelbuild.block_scaled import OPCODES as BLOCK_SCALED
from wheelbuild.plain_paths import PlainPaths
from wheelbuild.tile_model import floors
from wheelbuild.tile_model import tiles as tile_model

if TYPE_CHECKING:
    from mxfp4_moe.tiles import Tile
    from wheelbuild.settings import Settings
    from wheelbuild.thresholds import Thresholds
    from wheelbuild.toolchain import Toolchain

Kind = Literal["nvcc", "cxx", "link", "check", "load"]

TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000ULL".format(*floors.TORCH)
PYTHON_TARGET_VERSION = "0x{:02X}{:02X}0000".format(*floors.PYTHON)
# -objtemp: otherwise the numbers of nvcc's processes, in the names of its temporary files, reach the objects.
NVCC_FLAGS = tuple("-c -std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -Xptxas -v -objtemp -I csrc".split())
HIDDEN = tuple("-fPIC -fvisibility=hidden -fno-gnu-unique".split())
CXX_FLAGS = tuple("-c -std=c++17 -O2 -DNDEBUG -DUSE_CUDA -Wall -Wextra -fvisibility-inlines-hidden -I csrc".split())
LINK_FLAGS = tuple("-Wl,-s -Wl,--gc-sections".split())
# libstdc++ before torch, whose libraries export parts of it without a version. libtorch itself defines nothing of ours,
# but through it a CUDA torch puts libtorch_cuda in our reach. libdl by its file's name: csrc/old_systems.h asks for
# what older systems have there, and newer ones have an empty libdl.a that -ldl would find.
LINK_LIBRARIES = tuple("-lstdc++ -Wl,--no-as-needed -ltorch -l:libdl.so.2 -Wl,--as-needed -ltorch_cpu".split())
MOE_MODULE = "moe"
CHECKS = tuple(
    f"{name}.py" for name in "check machine_code control_flow data_flow main_loop block_scaled emulation".split()
)
EXPORTS = Path("wheelbuild/exports.map")


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """One command of the build. Relative paths are relative to the source tree's root."""

    name: str  # unique, e.g. tile_m128n128.120f.mxfp4_bf16
    kind: Kind
    module: str  # the extension it is for, e.g. tile_m128n128; of the one that loads them, "extensions"
    archs: tuple[str, ...]
    inputs: tuple[Path, ...]
    implicit: tuple[Path, ...]  # inputs that the command does not list
    output: Path
    record: Path | None  # where the wrapper writes time, memory and the compiler's words
    depfile: Path | None
    command: tuple[str, ...]
    pair: str = ""  # of formats that a tile's kernel reads
    machine_archs: tuple[str, ...] = ()  # whose machine code it makes: `archs`, but in a build that emulates

    @property
    def description(self) -> str:
        what = "compile" if self.kind in ("nvcc", "cxx") else self.kind
        source = f" {self.inputs[0].name}" if what == "compile" else ""
        archs = " for " + ", ".join(f"sm_{arch}" for arch in self.machine_archs) if self.kind == "nvcc" else ""
        return f"{self.module}: {what}{source}{archs}{self.pair and f', {self.pair}'}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    jobs: tuple[CompileJob, ...]
    modules: tuple[str, ...]
    tiles: tuple[Tile, ...]
    archs: tuple[str, ...]
    folder: Path
    links: Mapping[Path, Path] = field(default_factory=dict)  # to be made first: wheelbuild.plain_paths

    def library(self, module: str) -> Path:
        return self.folder / f"{module}.abi3.so"

    def check(self, module: str) -> Path:
        return self.folder / f"{module}.check.json"

    @property
    def load(self) -> Path:
        return self.folder / "load.json"

    def jobs_of(self, module: str, kind: str) -> tuple[CompileJob, ...]:
        return tuple(job for job in self.jobs if job.module == module and job.kind == kind)


def gencode(arch: str) -> tuple[str, str]:
    """Machine code for one arch and no PTX: nothing may be compiled on the user's machine."""
    return ("-gencode", f"arch=compute_{arch},code=sm_{arch}")


def tile_defines(tile: Tile) -> tuple[str, ...]:
    """What csrc/tile/ is compiled with to become this tile."""
    return (f"-DLOGICAL_TILE_M={tile.m}", f"-DLOGICAL_TILE_N={tile.n}", f"-DSWAP_AB={int(tile.swap_ab)}")


def kernel_defines(tile: Tile, arch: str, pair: str) -> tuple[str, ...]:
    """What csrc/tile/tile.cu is compiled with to become the tile's kernel that reads a pair of formats on an arch."""
    return (*tile_defines(tile), f"-DMXFP4_MOE_ARCH={arch}", f"-DMXFP4_MOE_PAIR={pair}")


def _of_kernels(
    kernels: Sequence[tuple[str, str]], made: Callable[[str, str], Mapping[str, Any]]
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """What `made` makes of each kernel, by arch and pair; nothing of those of which it makes nothing."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for arch, pair in kernels:
        if one := made(arch, pair):
            found.setdefault(arch, {})[pair] = one
    return found


def _main_loop(tile: Tile, arch: str, pair: str, thresholds: Thresholds) -> dict[str, str | float | None]:
    """What wheelbuild.check.check_main_loop expects of a kernel: per step of K, a warp's MMAs and what they read.

    A step is 32 k, of FP4 activations 64. They take two 8 x 16 byte matrices per 8 rows, bf16 four; wgmma reads them
    from shared memory itself. Packed weights take one word per lane and 32 k, of which as many come at once as stand
    side by side (csrc/shared/weight_layout.cuh) and are wanted so: four where the warp has as many groups of 8 rows; of
    an MMA of FP4 the two of a fragment of A, or one of B.
    """
    proof = tile_model.prove(tile, arch, pair)
    wgmma = proof.opcode == "HGMMA"
    fp4 = proof.steps_per_k_tile == 2
    act, weight = (proof.warp_n, proof.warp_m) if proof.weights_are_a else (proof.warp_m, proof.warp_n)
    return {
        "function": proof.function,
        "opcode": proof.opcode,
        "mma_per_step": proof.mma_per_step,
        "matrices_per_step": 0 if wgmma else act // 8 * (4 if proof.reads_halves else 2),
        "words_per_step": weight // 8 * (2 if fp4 else 1),
        "words_per_load": (2 if proof.weights_are_a else 1) if fp4 else min(weight // 8, 4),
        "variants": proof.reads_halves,
        "limit": thresholds.limit(arch, pair, tile.name),
    }


def _emulated(tile: Tile, pair: str) -> dict[str, str | int | bool]:
    """What wheelbuild.emulation.check_emulated_tile expects of a kernel: its MMAs in a K tile, of one warp.

    None is emulated of a kernel whose MMA both archs have. A fifth warp and more beside four, or a ninth beside eight,
    are the producer's; three more bring registers along.
    """
    proof = tile_model.prove(tile, emulation.ARCH, pair)
    spare_warps = proof.threads // 32 - proof.warps_m * proof.warps_n
    return {
        "function": proof.function,
        "mma_per_k_tile": proof.mma_per_step * proof.steps_per_k_tile if proof.opcode in BLOCK_SCALED else 0,
        "moves_registers": spare_warps > 1,
    }


def block_scaled(tile: Tile, arch: str, pair: str = tile_model.MXFP4_MXFP8) -> dict[str, object]:
    """What wheelbuild.block_scaled expects of a kernel; nothing of one whose MMA takes no scales."""
    proof = tile_model.prove(tile, arch, pair)
    if proof.opcode not in BLOCK_SCALED:
        return {}
    parts = ("stages", "act_bytes", "weight_bytes", "act_scale_bytes")
    memory = {part: getattr(proof, part) for part in parts}
    memory |= {
        "block_bytes": tile_model.weight_block_bytes(pair),
        "block_scale_bytes": tile_model.WEIGHT_BLOCK_ROWS * 4 * tile_model.scale_words(pair),
        "act_scale_set_bytes": (tile.m + 4) * 4,
    }
    return {"pair": pair, "weights": "A" if proof.weights_are_a else "B", "shared_memory": memory}


def _system(folders: Iterable[Path]) -> tuple[str, ...]:
    return tuple(word for folder in folders for word in ("-isystem", str(folder)))


def _dependencies(source: Path, output: Path) -> tuple[str, ...]:
    """The compiler's last words: what to compile, where to, and where to list the headers that it read."""
    return ("-MD", "-MF", f"{output}.d", str(source), "-o", str(output))


def own_name(source: Path) -> tuple[str, ...]:
    """nvcc names what is internal to a file after the file's absolute path; this has it use the relative one."""
    return ("-Xcudafe", f"--orig_src_path_name={source}")


def _prefix_maps(toolchain: Toolchain, plain: PlainPaths) -> tuple[str, ...]:
    """Messages quote __FILE__; these keep the builder's folders out of them, and out of the libraries.

    The source tree's own is not among them: sources are named relative to it.
    """
    maps = [(folder, "cutlass") for folder in toolchain.cutlass.include_dirs]
    maps += [(folder, "torch") for folder in toolchain.torch.include_dirs[:1]]
    maps += [(folder, "cuda") for folder in toolchain.cuda.include_dirs[:1]]
    return tuple(f"-ffile-prefix-map={plain(folder)}={name}" for folder, name in maps)


class _Planner:
    def __init__(self, settings: Settings, toolchain: Toolchain, thresholds: Thresholds, folder: Path) -> None:
        self.settings = settings
        self.toolchain = toolchain
        self.thresholds = thresholds
        self.folder = folder
        self.plain = PlainPaths(folder / "links")
        self.archs = settings.archs
        self.machine_archs = self.machine(settings.archs)
        self.defines = (emulation.DEFINE,) if settings.emulates else ()

    def machine(self, archs: Sequence[str]) -> tuple[str, ...]:
        return tuple(self.settings.compiled_for(arch) for arch in archs)

    def _job(
        self,
        kind: Kind,
        name: str,
        module: str,
        inputs: Sequence[Path],
        output: Path,
        command: Sequence[str | Path],
        *,
        archs: tuple[str, ...] = (),
        pair: str = "",
        implicit: Sequence[Path] = (),
    ) -> CompileJob:
        compiles = kind in ("nvcc", "cxx")
        return CompileJob(
            name=name,
            kind=kind,
            module=module,
            archs=archs,
            pair=pair,
            machine_archs=self.machine(archs),
            inputs=tuple(inputs),
            implicit=tuple(implicit),
            output=output,
            record=None if kind in ("check", "load") else output.with_name(output.name + ".json"),
            depfile=output.with_name(output.name + ".d") if compiles else None,
            command=tuple(str(word) for word in command),
        )

    def nvcc(
        self,
        module: str,
        source: Path,
        archs: tuple[str, ...],
        defines: tuple[str, ...],
        output: Path,
        pair: str = "",
    ) -> CompileJob:
        tools, plain = self.toolchain, self.plain
        command: list[str | Path] = [
            plain(tools.cuda.nvcc),  # which looks for its parts beside the name that it is called by
            *NVCC_FLAGS,
            *("-ccbin", str(plain(tools.cxx)), "-Xcompiler", ",".join((*HIDDEN, *_prefix_maps(tools, plain)))),
            *(word for arch in self.machine(archs) for word in gencode(arch)),
            *own_name(source),
            *defines,
            *self.defines,
            *_system(map(plain, tools.cutlass.include_dirs)),
            # Before nvcc's own, which are of the platform that builds.
            *(("-I", str(plain(tools.cuda.include_dirs[0]))) if self.settings.cross else ()),
            *(_system(map(plain, tools.cuda.include_dirs[1:])) if self.settings.cross else ()),
            *_dependencies(source, output),
        ]
        return self._job("nvcc", output.stem, module, [source], output, command, archs=archs, pair=pair)

    def cxx(self, module: str, source: Path, defines: tuple[str, ...], output: Path) -> CompileJob:
        tools, plain = self.toolchain, self.plain
        headers = (*tools.torch.include_dirs, *tools.python.include_dirs, *tools.cuda.include_dirs)
        command: list[str | Path] = [
            plain(tools.cxx),
            *CXX_FLAGS,
            *HIDDEN,
            *_prefix_maps(tools, plain),
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f"-DPy_LIMITED_API={PYTHON_TARGET_VERSION}",
            *defines,
            *self.defines,
            *_system(map(plain, headers)),
            *_dependencies(source, output),
        ]
        return self._job("cxx", output.stem, module, [source], output, command)

    def link(self, module: str, objects: Sequence[CompileJob], output: Path) -> CompileJob:
        tools, plain = self.toolchain, self.plain
        command: list[str | Path] = [
            plain(tools.cxx),
            *("-shared", "-o", str(output)),
            *(job.output for job in objects),
            *LINK_FLAGS,
            f"-Wl,--version-script={EXPORTS}",
            f"-L{plain(tools.torch.library_dir)}",
            *LINK_LIBRARIES,
            plain(tools.cuda.cudart),
        ]
        inputs = [job.output for job in objects]
        return self._job("link", f"{module}.link", module, inputs, output, command, implicit=[EXPORTS])

    def check(
        self, module: str, library: Path, compiled: Sequence[CompileJob], expect: Mapping[str, object]
    ) -> CompileJob:
        output = library.with_name(f"{module}.check.json")
        limits = {"peak_mb": self.thresholds.peak_mb}
        options: list[tuple[str, str | Path]] = [
            ("--library", library),
            ("--archs", ",".join(self.machine_archs)),
            ("--expect", json.dumps({"compile": limits, **expect}, sort_keys=True)),
            ("--cuobjdump", self.plain(self.toolchain.cuda.cuobjdump)),
            ("--output", output),
            *(("--record", job.record) for job in compiled if job.kind == "nvcc" and job.record is not None),
        ]
        command = [sys.executable, "-m", "wheelbuild.check", *(word for option in options for word in option)]
        code = [Path("wheelbuild") / name for name in CHECKS]
        return self._job("check", f"{module}.check", module, [library], output, command, implicit=code)

    def load(self, libraries: Sequence[Path], output: Path) -> CompileJob:
        expect: dict[str, object] = {
            tile.module: {
                "ops": [f"mxfp4_moe::grouped_gemm_{tile.name}"],
                "facts": _of_kernels(self.settings.kernels(tile), functools.partial(tile_model.facts, tile)),
            }
            for tile in self.settings.tiles
        }
        command: list[str | Path] = [
            *(self.toolchain.target_python or (sys.executable,)),
            *("-W", "ignore", "-m", "wheelbuild.load"),
            *("--expect", json.dumps(expect | {MOE_MODULE: {}}, sort_keys=True)),
            *("--cudart", self.toolchain.cuda.cudart),
            *("--output", output),
            *libraries,
        ]
        code = [Path("wheelbuild/load.py")]
        return self._job("load", "load", "extensions", libraries, output, command, implicit=code)

    def tile(self, tile: Tile) -> list[CompileJob]:
        module, folder, defines = tile.module, self.folder, tile_defines(tile)
        kernels = self.settings.kernels(tile)
        each_kernel = " ".join(f"X({arch}, {pair})" for arch, pair in kernels)
        objects = [
            self.nvcc(
                module,
                Path("csrc/tile/tile.cu"),
                (arch,),
                kernel_defines(tile, arch, pair),
                folder / f"{module}.{arch}.{pair}.o",
                pair,
            )
            for arch, pair in kernels
        ]
        objects.append(
            self.cxx(
                module,
                Path("csrc/tile/tile_op.cpp"),
                (*defines, f"-DTILE_NAME={tile.name}", f"-DMXFP4_MOE_FOR_EACH_KERNEL(X)={each_kernel}"),
                folder / f"{module}.op.o",
            )
        )
        library = folder / f"{module}.abi3.so"
        expect: dict[str, object]
        if self.settings.emulates:
            expect = {"emulated": {pair: _emulated(tile, pair) for _, pair in kernels}}
        else:
            expect = {
                "main_loop": _of_kernels(kernels, lambda arch, pair: _main_loop(tile, arch, pair, self.thresholds)),
                "block_scaled": _of_kernels(kernels, functools.partial(block_scaled, tile)),
            }
        return [*objects, self.link(module, objects, library), self.check(module, library, objects, expect)]

    def moe(self, sources: Sequence[Path]) -> list[CompileJob]:
        objects = []
        for source in sorted(sources):
            output = self.folder / f"{MOE_MODULE}.{source.name}.o"
            if source.suffix == ".cu":
                objects.append(self.nvcc(MOE_MODULE, source, self.archs, (), output))
            else:
                objects.append(self.cxx(MOE_MODULE, source, (), output))
        library = self.folder / f"{MOE_MODULE}.abi3.so"
        return [*objects, self.link(MOE_MODULE, objects, library), self.check(MOE_MODULE, library, objects, {})]


def plan(
    settings: Settings, toolchain: Toolchain, thresholds: Thresholds, moe_sources: Sequence[Path], folder: Path
) -> Plan:
    """Every job of the build, in an order in which they could run one after the other.

    `moe_sources` are the .cu and .cpp files of csrc/moe; `folder` is where objects and libraries go, under build/.
    """
    planner = _Planner(settings, toolchain, thresholds, folder)
    jobs = [job for tile in settings.tiles for job in planner.tile(tile)]
    jobs += planner.moe(moe_sources)
    made = Plan(
        jobs=tuple(jobs),
        modules=(*(tile.module for tile in settings.tiles), MOE_MODULE),
        tiles=settings.tiles,
        archs=settings.archs,
        folder=folder,
    )
    load = planner.load([made.library(module) for module in made.modules], made.load)
    return replace(made, jobs=(*made.jobs, load), links=planner.plain.links)
