"""What goes wrong when torch, the wheel, the CUDA runtime and the driver do not fit each other, and what to do.

One table: a message as ld.so, Python, torch or CUDA words it -> what it means -> the next step. Errors, the doctor and
docs/troubleshooting.md are all made from it. The first row that fits counts. Standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .._floors import PYTHON, TORCH, dotted

DOCTOR = "`mxfp4-moe doctor` says more"
REINSTALL = "reinstall the wheel: pip install --force-reinstall --no-deps mxfp4-moe"
TORCH_FLOOR = dotted(TORCH)


@dataclass(frozen=True, kw_only=True)
class Versions:
    """The CUDA versions here, as far as the words depend on them; empty where there is none."""

    wheel_cuda: str = ""  # of the toolkit that built the wheel, such as '13.0.88'
    torch_cuda: str = ""  # that torch was built for, such as '13.0'; empty for a CPU build
    importing_torch: bool = False  # the message came while torch itself was imported

    @property
    def wheel_major(self) -> str:
        return major(self.wheel_cuda) or "the wheel's version"

    @property
    def torch_major(self) -> str:
        return major(self.torch_cuda) or "torch's version"

    @property
    def majors_differ(self) -> bool:
        """Both are known, and the libraries that they bring are not the same."""
        return bool(self.wheel_cuda and self.torch_cuda) and major(self.wheel_cuda) != major(self.torch_cuda)


def major(version: str) -> str:
    return version.partition(".")[0]


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to be compared: (2, 10, 0) for '2.10.0a0+git1234', () for none."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A row. `means` and `remedy` may name {wheel_major} and {torch_major}, CUDA's major versions."""

    name: str
    pattern: str  # searched for in the message
    examples: tuple[str, ...]  # real messages
    means: str
    remedy: str
    when: Callable[[Versions], bool] = lambda versions: True

    def fits(self, message: str, versions: Versions) -> bool:
        return self.when(versions) and re.search(self.pattern, message) is not None

    def words(self, versions: Versions) -> tuple[str, str]:
        """What it means and what to do, for these versions."""
        names = {"wheel_major": versions.wheel_major, "torch_major": versions.torch_major}
        return self.means.format(**names), self.remedy.format(**names)


_NO_FILE = "cannot open shared object file: No such file or directory"

TROUBLES = (
    Trouble(
        name="no torch",
        pattern=r"No module named 'torch'",
        examples=("ModuleNotFoundError: No module named 'torch'",),
        means="torch is not installed in this Python",
        remedy="pip install 'torch>=2.10', in a build for CUDA {wheel_major}",
    ),
    Trouble(
        name="a package that is missing",
        pattern=r"No module named '(safetensors|tomli|numpy|typing_extensions)",
        examples=("ModuleNotFoundError: No module named 'safetensors'",),
        means="a package that mxfp4-moe or torch needs is not installed, as after pip install --no-deps",
        remedy="pip install mxfp4-moe, without --no-deps",
    ),
    Trouble(
        name="a torch that cannot be imported",
        pattern=r"",
        when=lambda versions: versions.importing_torch,
        examples=(f"ImportError: libcudnn.so.9: {_NO_FILE}",),
        means="torch itself cannot be imported here, mxfp4-moe has no part in it",
        remedy="reinstall torch with what it depends on: pip install --force-reinstall 'torch>=2.10'",
    ),
    Trouble(
        name="a torch without CUDA",
        pattern=r"Torch not compiled with CUDA enabled|this torch was built without CUDA|is a build without CUDA",
        examples=("AssertionError: Torch not compiled with CUDA enabled",),
        means="this torch is a build for the CPU alone, where CPU tensors work, slowly, and GPUs are not seen",
        remedy="install a torch that is built for CUDA {wheel_major}",
    ),
    Trouble(
        name="a torch that is too old",
        pattern=r"abi3\.so: undefined symbol: \w*(torch|c10)|module 'torch[\w.]*' has no attribute|named 'torch\."
        r"|cannot import name '\w+' from 'torch",
        examples=("ImportError: moe.abi3.so: undefined symbol: torch_list_push_back",),
        means="this torch is older than 2.10 and lacks functions that the wheel calls",
        remedy="pip install --upgrade 'torch>=2.10', in a build for CUDA {wheel_major}",
    ),
    Trouble(
        name="a wheel for another CUDA",
        pattern=r"libcudart\.so\.\d+: cannot open shared object file",
        when=lambda versions: versions.majors_differ,
        examples=(f"ImportError: libcudart.so.13: {_NO_FILE}",),
        means="the wheel needs the runtime of CUDA {wheel_major}, and this torch brings that of CUDA {torch_major}",
        remedy="install a torch that is built for CUDA {wheel_major}, or the mxfp4-moe wheel for CUDA {torch_major}",
    ),
    Trouble(
        name="no CUDA runtime library",
        pattern=r"libcudart\.so(\.\d+)?: cannot open shared object file",
        examples=(f"ImportError: libcudart.so.13: {_NO_FILE}",),
        means="the CUDA {wheel_major} runtime library, which a CUDA build of torch brings along, is not found",
        remedy="reinstall torch for CUDA {wheel_major} with what it depends on, or put the lib folder of a CUDA "
        "{wheel_major} toolkit into LD_LIBRARY_PATH",
    ),
    Trouble(
        name="a Python that cannot load the wheel",
        pattern=r"No module named 'mxfp4_moe\._ext\.",
        examples=("ModuleNotFoundError: No module named 'mxfp4_moe._ext.moe'",),
        means="the library is there, and this Python does not load libraries of the stable ABI: it is a free-threaded "
        "build, or not CPython",
        remedy=f"use an ordinary build of CPython {dotted(PYTHON)} or newer",
    ),
    Trouble(
        name="a glibc that is too old",
        pattern=r"version `GLIBC_[\d.]+' not found",
        examples=(
            "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by moe.abi3.so)",
        ),
        means="the system's C library is older than the one that the wheel was built against",
        remedy="use a newer Linux, or build the wheel on this one: ./ci/build.sh in the sources",
    ),
    Trouble(
        name="a libstdc++ that is too old",
        pattern=r"version `(GLIBCXX|CXXABI)_[\d.]+' not found",
        examples=("ImportError: libstdc++.so.6: version `GLIBCXX_3.4.26' not found (required by moe.abi3.so)",),
        means="the C++ library that was found first, often that of a conda environment, is older than the wheel needs",
        remedy="update it (conda install -c conda-forge libstdcxx-ng), or leave its folder out of LD_LIBRARY_PATH",
    ),
    Trouble(
        name="a folder that no library may be loaded from",
        pattern=r"failed to map segment from shared object",
        examples=("ImportError: moe.abi3.so: failed to map segment from shared object: Operation not permitted",),
        means="the file system that the wheel is installed on is mounted noexec",
        remedy="install into a folder that libraries may be loaded from",
    ),
    Trouble(
        name="a library that is damaged",
        pattern=r"abi3\.so (is (missing|truncated|damaged|no library|another module's|for another)|cannot be read)"
        r"|abi3\.so: (file too short|invalid ELF header|cannot read file data|ELF load command|undefined symbol)"
        r"|does not define module export function",
        examples=(
            "moe.abi3.so is truncated: 100,000 of 1,523,088 bytes",
            "tile_m64n128.abi3.so is missing",
            "ImportError: moe.abi3.so: file too short",
            "ImportError: moe.abi3.so: invalid ELF header",
        ),
        means="a file of the wheel is not what was built: an install that broke off, a full disk, or an edited file",
        remedy=REINSTALL,
    ),
    Trouble(
        name="no place for temporary files",
        pattern=r"No usable temporary directory found",
        examples=(
            "FileNotFoundError: [Errno 2] No usable temporary directory found in ['/tmp', '/var/tmp', '/usr/tmp', '/']",
        ),
        means="no folder for temporary files can be written",
        remedy="set TMPDIR to a folder that can be written and has space",
    ),
    Trouble(
        name="a driver that is too old",
        pattern=r"driver version is insufficient|NVIDIA driver on your system is too old|cudaErrorInsufficientDriver"
        r"|it is older than CUDA 12\.0",
        examples=(
            "CUDA driver version is insufficient for CUDA runtime version",
            "The NVIDIA driver on your system is too old (found version 12040).",
        ),
        means="the NVIDIA driver is older than the CUDA runtime that torch or the wheel brings",
        remedy="update the NVIDIA driver to one that serves CUDA {wheel_major} (nvidia-smi shows it as CUDA Version)",
    ),
    Trouble(
        name="a driver in two versions",
        pattern=r"unsupported display driver / cuda driver combination|forward compatibility was attempted|"
        r"Driver/library version mismatch",
        examples=(
            "system has unsupported display driver / cuda driver combination",
            "forward compatibility was attempted on non supported HW",
        ),
        means="the driver in the kernel and libcuda.so, which programs load, are not of one version",
        remedy="restart the machine after a driver update; in a container, leave its cuda-compat folder out of "
        "LD_LIBRARY_PATH",
    ),
    Trouble(
        name="no driver or no GPU",
        pattern=r"Found no NVIDIA driver|no CUDA-capable device is detected|No CUDA GPUs are available",
        examples=(
            "Found no NVIDIA driver on your system.",
            "no CUDA-capable device is detected",
            "No CUDA GPUs are available",
        ),
        means="the NVIDIA driver shows this process no GPU",
        remedy="check nvidia-smi and CUDA_VISIBLE_DEVICES; a container needs --gpus all",
    ),
    Trouble(
        name="a GPU of another arch",
        pattern=r"no kernel image is available|device kernel image is invalid|cudaErrorNoKernelImageForDevice"
        r"|wheel has (no )?machine code for",
        examples=("no kernel image is available for execution on the device", "device kernel image is invalid"),
        means="the wheel has no machine code for this GPU",
        remedy="use a GPU that `mxfp4-moe doctor` names, or the CPU, where tensors work, slowly",
    ),
)


def recognize(message: str, versions: Versions) -> Trouble | None:
    """The row for a message; None for one that is not in the table.

    Args:
        message: an exception as `words` gives it, or one line of it.
        versions: what is here; the same message means different things with a torch for another CUDA.
    """
    return next((trouble for trouble in TROUBLES if trouble.fits(message, versions)), None)


def one_line(text: str) -> str:
    """What a message says first; torch adds advice and the place in its sources, and CUDA a page more."""
    line = (text.strip().splitlines() or [""])[0]
    return re.split(r" Please | \(Triggered internally", line)[0].strip()


def words(error: BaseException) -> str:
    """An exception in one line, with its type where that says something."""
    line = one_line(str(error))
    return line if type(error) is RuntimeError and line else f"{type(error).__name__}: {line}".removesuffix(": ")


# ---- what mxfp4-moe says itself --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OwnMessage:
    """A warning or an error of the package's own, for docs/troubleshooting.md; "..." stands for what varies."""

    message: str
    means: str
    remedy: str


OWN_MESSAGES = (
    OwnMessage(
        message="tile ... is not used on ...: ...; ... takes its place, with the same results",
        means="a tile failed the self-test on this GPU, or its library does not load; another one gives the same bits",
        remedy="nothing has to be done; `mxfp4-moe doctor` says what is wrong with the tile",
    ),
    OwnMessage(
        message="blocklist ... and is ignored: ...",
        means="the list of tiles that failed is damaged, or of another wheel or GPU, as after an update",
        remedy="run `mxfp4-moe doctor --selftest`",
    ),
    OwnMessage(
        message="no tile can be used on ...",
        means="every tile is blocked or does not load",
        remedy="`mxfp4-moe doctor --selftest` says what is wrong with each",
    ),
    OwnMessage(
        message="mxfp4_moe._ext... needs a CUDA build of torch",
        means="a kernel was asked for under a torch for the CPU alone",
        remedy="install a torch that is built for the wheel's CUDA; on CPU tensors `fused_moe` needs no kernel",
    ),
    OwnMessage(
        message="hidden_states: expected a tensor on a GPU that this wheel has machine code for",
        means="the GPU is of an arch that the wheel was not built for",
        remedy="use one of the GPUs that the message names, or CPU tensors, slowly",
    ),
    OwnMessage(
        message="...: cannot be read: ...",
        means="no safetensors file, or not all of one: a Git LFS pointer, a web page, GGUF, a pickle, half a download",
        remedy="the message says which; `mxfp4-moe inspect PATH` shows what can be loaded",
    ),
    OwnMessage(
        message="...: no experts in a naming that is known ...",
        means="the checkpoint's names for experts are none of those in docs/models.md",
        remedy="`MoEWeights.from_mxfp4` and `from_float` take tensors of any name",
    ),
    OwnMessage(
        message="... expected experts with weights, got ones on meta (offloaded, or never loaded) ...",
        means="`replace_experts` was given a model whose experts accelerate keeps elsewhere",
        remedy="pass checkpoint=, or load the model without offloading its experts",
    ),
    OwnMessage(
        message="...: no gradient can be computed through it ...",
        means="a backward pass came to the layer, whose weights are for inference",
        remedy="call it under torch.no_grad(); train with the model's own experts and convert them afterwards",
    ),
)
