"""The NVIDIA driver as the system knows it, without torch."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def driver_version() -> str:
    """The kernel driver's version, such as '580.82.07'; 'unknown' where the system does not say."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _VERSION_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"


def driver_cuda() -> str:
    """The newest CUDA version that the driver serves, such as '13.0'; 'none' without a driver."""
    number = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return "none"
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 and number.value else "none"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that the driver shows this process: CUDA_VISIBLE_DEVICES counts, torch does not."""

    index: int
    name: str  # such as 'NVIDIA H200'
    capability: tuple[int, int]


def driver_gpus() -> tuple[Gpu, ...]:
    """The GPUs here, in CUDA's order.

    Raises:
        RuntimeError: the driver is there and does not start; its own words. Without a driver there are no GPUs.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()

    def call(function: str, *arguments: object) -> None:
        if not hasattr(cuda, function):
            raise RuntimeError(f"libcuda.so.1 has no {function}: it is not the NVIDIA driver's")
        if status := getattr(cuda, function)(*arguments):
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode(errors="replace") if text.value else "unknown error"
            raise RuntimeError(f"{function}: {reason} ({status})")

    count, device, value = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(256)

    def attribute(number: int) -> int:
        call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    if hasattr(cuda, "cuInit") and cuda.cuInit(0) == _NO_DEVICE:
        return ()
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, len(name), device)
        capability = (attribute(_MAJOR), attribute(_MINOR))
        gpus.append(Gpu(index=index, name=name.value.decode(errors="replace"), capability=capability))
    return tuple(gpus)
