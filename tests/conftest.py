"""Settings shared by all tests."""

import importlib.util
import os
import subprocess
import sysconfig
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from mxfp4_moe.probe.assemblers import Assembler, examine
from wheelbuild import ROOT, toolchain
from wheelbuild.assemblers import install_all

# The tests make many small tensor operations, where a second thread mostly waits, badly so on a busy machine.
torch.set_num_threads(1)

settings.register_profile("mxfp4_moe", deadline=None, max_examples=60)
settings.load_profile("mxfp4_moe")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A GPU test that was asked for (-m gpu) fails without a GPU: skipping it would look like success."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("marked gpu, and torch sees no GPU here", pytrace=False)
    if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
        pytest.fail("marked multigpu, and torch sees fewer than two GPUs here", pytrace=False)


@pytest.fixture(scope="session")
def assemblers() -> dict[str, Assembler]:
    """ptxas of every release in ci/cuda-versions.json, by release, oldest first; fetched where it is not there yet."""
    return {release: examine(path, "ci/cuda-versions.json") for release, path in install_all().items()}


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """tests/cpu/host/bindings.cpp, compiled with g++ and the headers that the wheel is built with."""
    import pybind11  # a machine with a GPU need not have it

    folders = toolchain.package_dirs(os.environ)
    cuda = toolchain.resolve_cuda({**os.environ, "MXFP4_MOE_TOOLCHAIN": "pypi"}, folders, ["120f"])
    cutlass = toolchain.find_cutlass(os.environ, folders)
    library = tmp_path_factory.mktemp("host") / ("mxfp4_moe_host" + sysconfig.get_config_var("EXT_SUFFIX"))
    system = [*cutlass.include_dirs, *cuda.include_dirs, pybind11.get_include(), sysconfig.get_path("include")]
    command = [
        str(toolchain.find_cxx(os.environ)),
        *("-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"),
        *(word for folder in system for word in ("-isystem", str(folder))),
        *(str(ROOT / "tests" / "cpu" / "host" / "bindings.cpp"), "-o", str(library)),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    spec = importlib.util.spec_from_file_location("mxfp4_moe_host", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
