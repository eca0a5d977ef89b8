"""The NVIDIA driver as the system knows it, without torch."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_VERSION_FILE = Path("/proc/driver/nvidia/version")


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
