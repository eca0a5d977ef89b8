"""The process in which the wheel's extensions believe that they have a GPU; ptx/launch.py starts it.

The fake runtime and the fake of what a CUDA torch adds are loaded before torch, so that they take the place of the real
ones in this process and in no other. Requests come pickled on standard input, (method, arguments) of `Machine`; answers
go to standard output, ("ok", value) or ("error", text). Tensors are `Tensor` records: an address of the process that
asks, which is a number here. Host code must not look at device memory: it would find other bytes there, or none.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import abi

_OPERATORS = "mxfp4_moe._ext.moe"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A contiguous tensor at an address of the asking process."""

    address: int
    shape: tuple[int, ...]
    dtype: str  # torch's name, such as "bfloat16"


class Machine:
    def __init__(self, cudart: Path, torch_cuda: Path) -> None:
        self.cuda = ctypes.CDLL(str(cudart), ctypes.RTLD_GLOBAL)
        self.torch_cuda = ctypes.CDLL(str(torch_cuda), ctypes.RTLD_GLOBAL)
        for library, name in [
            (self.cuda, "fake_take_log"),
            (self.cuda, "fake_refusal"),
            (self.torch_cuda, "fake_take_allocations"),
        ]:
            getattr(library, name).restype = ctypes.c_char_p
        import torch

        self.torch = torch
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self.torch_cuda.fake_torch_init(library.aoti_torch_create_tensor_from_blob)
        self.tiles: dict[str, abi.Tile] = {}
        self.launchers: dict[str, Any] = {}

    def add_device(self, *facts: int) -> int:
        """Arguments as fake_cudart.cpp's fake_add_device; returns its number."""
        return int(self.cuda.fake_add_device(*facts))

    def learn(self, kernels: dict[str, tuple[Sequence[int], int]]) -> None:
        """Kernel name -> bytes of each parameter, most threads of a block."""
        for name, (params, threads) in kernels.items():
            self.cuda.fake_learn(name.encode(), len(params), (ctypes.c_size_t * len(params))(*params), threads)

    def layout(self) -> dict[str, tuple[int, int]]:
        """abi.layout(), from the C++ compiler."""
        found = {}
        fields = ctypes.cast(self.torch_cuda.fake_tile_abi, ctypes.POINTER(abi.Field))
        for field in fields:
            if not field.name:
                return found
            found[field.name.decode()] = (field.offset, field.bytes)
        raise AssertionError("unreachable")

    def workspace(self, count: int, *shape: int) -> list[int]:
        """The first `count` numbers of fake_torch_cuda.cpp's fake_workspace."""
        offsets = (ctypes.c_int64 * count)()
        self.torch_cuda.fake_workspace(*map(ctypes.c_int64, shape), offsets)
        return list(offsets)

    def encode(
        self,
        data_type: int,
        address: int,
        extents: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        element_strides: Sequence[int],
        swizzle: int,
    ) -> bytes | str:
        """cuTensorMapEncodeTiled without interleave: the map, or why not."""
        u64, u32 = ctypes.c_uint64 * 5, ctypes.c_uint32 * 5
        room = (ctypes.c_uint8 * 192)()
        at = -ctypes.addressof(room) % 64
        error = self.cuda.fake_encode_tiled(
            ctypes.byref(room, at),
            data_type,
            len(extents),
            ctypes.c_void_p(address),
            u64(*extents),
            u64(*strides),
            u32(*box),
            u32(*element_strides),
            *(0, swizzle, 0, 0),
        )
        return self._refusal() if error else bytes(room[at : at + 128])

    def gemm(self, module: str, args: bytes, device: int) -> list[dict[str, Any]]:
        """What a tile's `launch` launches for a Mxfp4MoeGemmArgs; RuntimeError in its words where it refuses."""
        if module not in self.tiles:
            entry = importlib.import_module(f"mxfp4_moe._ext.{module}").entry
            self.tiles[module] = abi.Tile.from_address(entry)
        return self._launched(self.tiles[module].launch, args, device)

    def launch(self, library: str, function: str, args: bytes, device: int) -> list[dict[str, Any]]:
        """The same of a launcher in a library that is no extension."""
        if library not in self.launchers:
            found = getattr(ctypes.CDLL(library), function)
            found.restype, found.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
            self.launchers[library] = found
        return self._launched(self.launchers[library], args, device)

    def _launched(self, launch: Any, args: bytes, device: int) -> list[dict[str, Any]]:
        self.cuda.fake_set_device(device)
        reason = launch(ctypes.create_string_buffer(args, len(args)))
        launches = self._launches()
        if reason is not None:
            raise RuntimeError(reason.decode())
        return launches

    def operator(
        self, name: str, args: Sequence[Any], options: dict[str, Any], arena: tuple[int, int], device: int
    ) -> tuple[list[dict[str, Any]], list[tuple[int, int]], Any]:
        """Calls the CUDA kernel of torch.ops.mxfp4_moe.<name>: its launches, its allocations, what it returned."""
        importlib.import_module(_OPERATORS)
        torch = self.torch
        self.cuda.fake_set_device(device)
        self.torch_cuda.fake_set_arena(ctypes.c_uint64(arena[0]), ctypes.c_uint64(arena[1]))
        operator = getattr(torch.ops.mxfp4_moe, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        try:
            result = operator.redispatch(
                keys, *map(self._tensor, args), **{key: self._tensor(value) for key, value in options.items()}
            )
        finally:
            launches, text = self._launches(), self.torch_cuda.fake_take_allocations().decode()
        allocations = [(int(address), int(count)) for address, count in map(str.split, text.splitlines())]
        return launches, allocations, self._described(result)

    def register_tile(self, module: str) -> None:
        """Makes a tile known to the layer, as mxfp4_moe._install.loading does."""
        importlib.import_module(_OPERATORS)
        self.torch.ops.mxfp4_moe.register_tile(importlib.import_module(f"mxfp4_moe._ext.{module}").entry)

    def register_kernel(
        self, library: str, launcher: str, facts: str, sizes: Sequence[int], reads: tuple[int, int]
    ) -> None:
        """Makes a tile with one kernel known to the layer: what csrc/tile/tile_op.cpp would make of it."""
        loaded = ctypes.CDLL(library)
        kinds = dict(abi.Tile._fields_)
        address = ctypes.addressof(ctypes.c_char.in_dll(loaded, facts))
        facts_of = kinds["facts_of"](lambda device, *asked: address if asked == reads else None)
        launch = ctypes.cast(getattr(loaded, launcher), kinds["launch"])
        self.made = abi.Tile(abi.VERSION, *sizes, facts_of, launch)  # kept: the layer holds its address
        importlib.import_module(_OPERATORS)
        self.torch.ops.mxfp4_moe.register_tile(ctypes.addressof(self.made))

    def _launches(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.cuda.fake_take_log().splitlines()]

    def _refusal(self) -> str:
        return self.cuda.fake_refusal().decode()

    def _tensor(self, value: Any) -> Any:
        """A torch tensor at the record's address; nothing looks at its values."""
        if not isinstance(value, Tensor):
            return value
        dtype = getattr(self.torch, value.dtype)
        if 0 in value.shape:
            return self.torch.empty(value.shape, dtype=dtype)
        count = self.torch.Size(value.shape).numel() * dtype.itemsize
        memory = (ctypes.c_uint8 * count).from_address(value.address)
        return self.torch.frombuffer(memory, dtype=dtype).view(value.shape)

    def _described(self, result: Any) -> Any:
        if isinstance(result, self.torch.Tensor):
            dtype = str(result.dtype).removeprefix("torch.")
            return Tensor(address=result.data_ptr(), shape=tuple(result.shape), dtype=dtype)
        return tuple(map(self._described, result)) if isinstance(result, (tuple, list)) else result


def serve(machine: Machine, requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            method, args = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = ("ok", getattr(machine, method)(*args))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def main(cudart: str, torch_cuda: str) -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    serve(Machine(Path(cudart), Path(torch_cuda)), sys.stdin.buffer, answers)
