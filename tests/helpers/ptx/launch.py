"""What our own host code launches, without a GPU: kernel, grid, shared memory and the bytes of every parameter.

`Recorder` starts a process (ptx/recorder.py) in which the installed wheel's extensions meet a fake CUDA runtime
(fake_cudart.cpp, tensor_map.h) and, where operators ask for it, a fake CUDA torch (fake_torch_cuda.cpp). Launchers and
operators are the wheel's own machine code. Addresses are those of this process's tensors and arrays, on which the
kernels' PTX is then executed.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mxfp4_moe import tiles
from mxfp4_moe.tiles import stages
from wheelbuild import toolchain
from wheelbuild.kernel_ptx import compile_source_to_ptx, compile_to_ptx
from wheelbuild.toolchain import Cuda

from . import abi, host_code, recorder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ARENA_BYTES = 32 << 20
_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from ptx import recorder; recorder.main(*sys.argv[2:])"
_THREADS_PER_SM = {9: 2048, 12: 1536}  # CUDA programming guide, "Compute Capabilities"


class RefusedError(Exception):
    """Host code refused, or the fake runtime did; the message is its own."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    kernel: str  # the mangled name of its .entry
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem_bytes: int
    programmatic: bool  # may start before the one before it is done
    params: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Recording:
    launches: list[Launch]
    allocations: list[np.ndarray]  # uint8, what the operator asked torch for: parts of an arena, not written yet
    results: Any  # tensors, in these allocations


def entries(ptx: str) -> dict[str, tuple[list[int], int]]:
    """Of each kernel in a PTX file the bytes of its parameters, and the most threads of a block."""
    found = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", ptx, re.DOTALL):
        params = [_param_bytes(text) for text in match[2].split(",") if text.strip()]
        threads = re.search(r"\.maxntid\s+(\d+)((?:\s*,\s*\d+)*)", match[3])
        sizes = [int(size) for size in re.findall(r"\d+", threads[0])] if threads else [1024]
        found[match[1]] = (params, int(np.prod(sizes)))
    return found


def _param_bytes(text: str) -> int:
    """Of `.param .align 8 .b8 name[88]` or `.param .u64 .ptr .global .align 4 name`."""
    match = re.search(r"\.[busf](8|16|32|64)\b.*?(?:\[(\d+)\])?\s*$", text.strip(), re.DOTALL)
    assert match is not None, text
    return int(match[1]) // 8 * int(match[2] or 1)


def build(folder: Path, cuda: Cuda, cxx: Path) -> tuple[Path, Path]:
    """Compiles the fakes into `folder`: of the runtime, and of what a CUDA torch adds.

    Where torch is a CPU build, they have the names of the libraries that are missing, so that the loader takes them for
    those. Where it is a CUDA build, they have names of their own, and only what they define takes precedence.
    """
    soname = cuda.cudart.name
    names = (soname, "libtorch_cuda.so") if torch.version.cuda is None else ("libfake_cudart.so", "libfake_torch.so")
    cudart, torch_cuda = (folder / name for name in names)
    versions = folder / "versions.map"
    versions.write_text(f"{soname} {{ global: *; }};\n", encoding="ascii")
    includes = [word for path in cuda.include_dirs for word in ("-isystem", str(path))]
    common = [str(cxx), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}", *includes]
    for words in (
        ["fake_cudart.cpp", f"-Wl,-soname,{cudart.name}", f"-Wl,--version-script={versions}", "-o", str(cudart)],
        ["fake_torch_cuda.cpp", str(cudart), f"-Wl,-soname,{torch_cuda.name}", "-o", str(torch_cuda)],
    ):
        built = subprocess.run([*common, *words], cwd=HERE, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
    return cudart, torch_cuda


@functools.cache
def shared_recorder() -> Recorder:
    """One for all tests of a session: starting it takes three seconds."""
    folder = tempfile.TemporaryDirectory(prefix="mxfp4-moe-recorder-")
    recorder = Recorder(Path(folder.name), *tools())

    def end() -> None:
        recorder.close()
        folder.cleanup()

    atexit.register(end)
    return recorder


def tools() -> tuple[Cuda, Path]:
    """The CUDA toolkit and the C++ compiler that wheels are built with."""
    folders = toolchain.package_dirs(os.environ)
    return toolchain.resolve_cuda(os.environ, folders, ["120f"]), toolchain.find_cxx(os.environ)


@functools.cache
def ptx_of_tile(tile: tiles.Tile, arch: str = "120f", pair: str = tiles.MXFP4_MXFP8) -> str:
    """The tile's kernel for a pair of formats as PTX, known to `shared_recorder`."""
    if pair != tiles.MXFP4_MXFP8:
        return _learned(host_code.built(tile, pair, arch)[1])
    return _learned(compile_to_ptx(tile, arch, pair))


@functools.cache
def ptx_of_moe(source: str, arch: str = "120f") -> str:
    """The kernels of csrc/moe/<source>.cu as PTX, known to `shared_recorder`."""
    return _learned(compile_source_to_ptx(Path(f"csrc/moe/{source}.cu"), arch, (), source))


def _learned(ptx: str) -> str:
    shared_recorder().learn(ptx)
    return ptx


class Recorder:
    """A machine with fake GPUs of compute capability 12.0, one for each number of SMs that is asked for."""

    def __init__(self, folder: Path, cuda: Cuda, cxx: Path) -> None:
        arguments = [sys.executable, "-c", _CHILD, str(HERE.parent), *map(str, build(folder, cuda, cxx))]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._devices: dict[tuple[str, int], int] = {}

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def learn(self, ptx: str) -> None:
        """The kernels of a PTX file, without which launches of them are refused."""
        self._ask("learn", entries(ptx))

    def gemm(self, tile: tiles.Tile, args: abi.GemmArgs, *, sms: int = 2, arch: str = "120f") -> list[Launch]:
        """What the tile's extension launches; RefusedError in its words where it refuses."""
        return list(_launches(self._ask("gemm", tile.module, bytes(args), self.device(sms, arch))))

    def gemm_of(
        self, tile: tiles.Tile, pair: str, args: abi.GemmArgs, *, sms: int = 2, arch: str = host_code.ARCH
    ) -> list[Launch]:
        """The same of one kernel's launcher, compiled for the test where wheels need not have it."""
        if pair == tiles.MXFP4_MXFP8:
            return self.gemm(tile, args, sms=sms)
        library, device = host_code.built(tile, pair, arch)[0], self.device(sms, arch)
        return list(_launches(self._ask("launch", str(library), host_code.launcher(pair, arch), bytes(args), device)))

    def operator(self, name: str, *args: Any, sms: int = 2, arch: str = "120f", **options: Any) -> Recording:
        """What torch.ops.mxfp4_moe.<name> launches, given CPU tensors in the place of CUDA ones."""
        arena = np.zeros(ARENA_BYTES, np.uint8)
        base = arena.ctypes.data
        answer = self._ask(
            "operator",
            name,
            [_described(arg) for arg in args],
            {key: _described(value) for key, value in options.items()},
            (base, arena.size),
            self.device(sms, arch),
        )
        launches, allocated, results = answer

        def returned(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(returned, value))
            if not isinstance(value, recorder.Tensor):
                return value
            dtype = getattr(torch, value.dtype)
            count = int(np.prod(value.shape, dtype=np.int64)) * dtype.itemsize
            part = arena[value.address - base :][:count] if count else arena[:0]
            return torch.from_numpy(part).view(dtype).view(value.shape)

        return Recording(
            launches=list(_launches(launches)),
            allocations=[arena[address - base :][:count] for address, count in allocated],
            results=returned(results),
        )

    def register_tile(self, tile: tiles.Tile) -> None:
        self._ask("register_tile", tile.module)

    def register_kernel(self, tile: tiles.Tile, pair: str, arch: str = host_code.ARCH) -> None:
        """Makes the layer find one kernel of a tile, compiled for the test, and no other of it."""
        sizes = (tile.m, tile.n, int(tile.swap_ab))
        names = (host_code.launcher(pair, arch), host_code.facts(pair, arch))
        library = host_code.built(tile, pair, arch)[0]  # cached by its arguments as they are written
        self._ask("register_kernel", str(library), *names, sizes, abi.formats_of(pair))

    def layout(self) -> dict[str, tuple[int, int]]:
        return self._ask("layout")

    def workspace(self, count: int, *shape: int) -> list[int]:
        return self._ask("workspace", count, *shape)

    def encode(self, *args: Any) -> bytes | str:
        return self._ask("encode", *args)

    def device(self, sms: int, arch: str) -> int:
        if (arch, sms) not in self._devices:
            major = 12 if arch.startswith("12") else 9
            smem = (stages.SMEM_PER_SM[major], tiles.max_smem_per_block(arch), stages.SMEM_RESERVED_PER_BLOCK)
            number = self._ask("add_device", major, 0, sms, *smem, _THREADS_PER_SM[major])
            self._devices[arch, sms] = number
        return self._devices[arch, sms]

    def _ask(self, method: str, *args: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((method, args), self._process.stdin)
        self._process.stdin.flush()
        try:
            outcome, value = pickle.load(self._process.stdout)
        except EOFError:
            raise AssertionError(f"the recorder ended with status {self._process.wait()} in {method}") from None
        if outcome == "error":
            raise RefusedError(value)
        return value


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    assert value.is_contiguous()
    return recorder.Tensor(
        address=value.data_ptr(), shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch.")
    )


def _launches(records: Sequence[Mapping[str, Any]]) -> Iterator[Launch]:
    for record in records:
        words = {name: tuple(record[name]) for name in ("grid", "block", "cluster")}
        params = tuple(bytes.fromhex(text) for text in record["params"])
        yield Launch(**{**record, **words, "params": params})
