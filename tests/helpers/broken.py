"""Environments in which the wheel does not work, or does, made of a copy of the installed wheel and stubs around it.

The doctor runs in them as a user would run it: a process of its own, through the command line. Stubs: `torch` (the real
one, changed), libcuda.so.1 (a driver with one GPU), and sonames that no machine has a library for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mxfp4_moe
from mxfp4_moe.tiles import load_manifest
from wheelbuild import ROOT
from wheelbuild.toolchain import find_cxx, package_dirs, resolve_cuda

PACKAGE = Path(mxfp4_moe.__file__).parent
GPU, CAPABILITY = "NVIDIA GeForce RTX 5090", (12, 0)
NO_CUDA = 93  # the major version of a CUDA that no machine has

# The driver's part that is asked by the doctor. What has been shown with it says nothing about a GPU.
DRIVER = f"""
#include <string.h>
extern "C" {{
int cuDriverGetVersion(int* version) {{ *version = 13000; return 0; }}
int cuInit(unsigned) {{ return 0; }}
int cuDeviceGetCount(int* count) {{ *count = 1; return 0; }}
int cuDeviceGet(int* device, int index) {{ *device = index; return 0; }}
int cuDeviceGetName(char* name, int size, int) {{ strncpy(name, "{GPU}", size); return 0; }}
int cuDeviceGetAttribute(int* value, int attribute, int) {{
  *value = attribute == 75 ? {CAPABILITY[0]} : {CAPABILITY[1]};
  return 0;
}}
}}
"""

# A CUDA torch, as far as the doctor asks: the real one, which says that it has CUDA and sees the driver's GPU.
CUDA_TORCH = f"""
import os, sys
sys.path.remove(os.path.dirname(os.path.dirname(__file__)))
del sys.modules["torch"]
import torch
torch.version.cuda = os.environ["TEST_TORCH_CUDA"]
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index: {GPU!r}
"""
CPU_TORCH = CUDA_TORCH[: CUDA_TORCH.index("torch.version.cuda")] + "torch.version.cuda = None\n"
OLD_TORCH = """
__version__ = "2.9.1+cu130"
class version: cuda = "13.0"
class cuda: is_available = staticmethod(lambda: False)
"""


def make_driver(folder: Path) -> None:
    """Puts a libcuda.so.1 into the folder."""
    source = folder / "cuda.cpp"
    source.write_text(DRIVER)
    cxx = str(find_cxx(os.environ))
    subprocess.run([cxx, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)


def cudart() -> Path:
    """The CUDA runtime library that the wheel was built with."""
    return resolve_cuda(os.environ, package_dirs(os.environ), load_manifest(ROOT / "tile_manifest.toml").archs).cudart


@dataclass
class Place:
    """A folder with an installed wheel, a torch, a driver and a cache; all is well until a test breaks it."""

    folder: Path
    libraries: Path  # the driver's and the CUDA runtime's folder
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        for metadata in PACKAGE.parent.glob("mxfp4_moe-*.dist-info"):  # the version is in it
            shutil.copytree(metadata, self.package.parent / metadata.name)
        self.set_torch(CUDA_TORCH)
        self.env = {
            "TEST_TORCH_CUDA": "13.0",
            "MXFP4_MOE_CACHE_DIR": str(self.folder / "cache"),
            "LD_LIBRARY_PATH": str(self.libraries),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "stubs"), str(self.package.parent)]),
            "PYTHONWARNINGS": "ignore",
        }

    @property
    def package(self) -> Path:
        return self.folder / "site" / "mxfp4_moe"

    def library(self, module: str) -> Path:
        return self.package / "_ext" / f"{module}.abi3.so"

    def set_torch(self, program: str) -> None:
        stub = self.folder / "stubs" / "torch" / "__init__.py"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(program)

    def set_cuda_of_wheel(self, major: int) -> None:
        """Makes the wheel one for another CUDA: the soname that its libraries need, and the report's words."""
        report = self.package / "build_report.json"
        data = json.loads(report.read_text())
        built, data["built_with"]["cuda"] = data["built_with"]["cuda"].partition(".")[0], f"{major}.0.1"
        report.write_text(json.dumps(data))
        for path in self.package.glob("_ext/*.so"):
            old, new = f"libcudart.so.{built}\0".encode(), f"libcudart.so.{major}\0".encode()
            assert len(old) == len(new), "the string table keeps its size"
            path.write_bytes(path.read_bytes().replace(old, new))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | self.env,
            cwd=self.folder,
        )

    def doctor(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Exit status and what --json says; never a traceback."""
        result = self.run("-m", "mxfp4_moe.cli", "doctor", "--json", *arguments)
        assert "Traceback" not in result.stdout + result.stderr
        return result.returncode, json.loads(result.stdout)
