"""Which CUDA, CUTLASS, torch and g++ a build takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from build_cases import MANIFEST

from wheelbuild import BuildError
from wheelbuild.toolchain import (
    Headers,
    find_cutlass,
    find_cxx,
    find_torch,
    package_dirs,
    parse_nvcc_version,
    resolve_cuda,
)


def fake_toolkit(root: Path, version: str = "13.0", *, cuobjdump: bool = True, lib: str = "lib") -> Path:
    """A folder that looks like a CUDA toolkit; its nvcc tells the version and nothing else."""
    (root / "bin").mkdir(parents=True)
    (root / "include" / "cccl").mkdir(parents=True)
    (root / lib).mkdir(parents=True)
    (root / lib / f"libcudart.so.{version.split('.')[0]}").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then\n'
        f'  echo "Cuda compilation tools, release {version}, V{version}.88"\n'
        "else\n"
        f'  echo "#$ TOP={root}/bin/.." >&2\n'
        "fi\n",
        encoding="utf-8",
    )
    nvcc.chmod(0o755)
    if cuobjdump:
        (root / "bin" / "cuobjdump").touch(mode=0o755)
    return root


@pytest.fixture
def three(tmp_path: Path) -> tuple[Mapping[str, str], Path]:
    """An environment with a toolkit by CUDA_HOME, another on PATH, and a folder of packages with a third."""
    fake_toolkit(tmp_path / "home", "13.2")
    fake_toolkit(tmp_path / "path", "13.1")
    fake_toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.0")
    return {
        "CUDA_HOME": str(tmp_path / "home"),
        "PATH": f"{tmp_path / 'path' / 'bin'}:/usr/bin:/bin",
    }, tmp_path / "site"


def test_cuda_home_comes_first_then_path_then_packages(three: tuple[Mapping[str, str], Path]) -> None:
    env, site = three
    found = resolve_cuda(env, [site], MANIFEST.archs)
    assert (found.origin, found.version, found.label) == ("CUDA_HOME", (13, 2, 88), "cu132")
    assert found.cudart.name == "libcudart.so.13"
    assert [folder.name for folder in found.include_dirs] == ["include", "cccl"]

    env = {"PATH": env["PATH"]}
    found = resolve_cuda(env, [site], MANIFEST.archs)
    assert (found.origin, found.version) == ("PATH", (13, 1, 88))

    env = {"PATH": "/usr/bin:/bin"}
    found = resolve_cuda(env, [site], MANIFEST.archs)
    assert (found.origin, found.version) == ("packages", (13, 0, 88))
    assert found.nvcc == site / "nvidia" / "cu13" / "bin" / "nvcc"


def test_the_packages_can_be_forced(three: tuple[Mapping[str, str], Path], tmp_path: Path) -> None:
    env, site = three
    assert resolve_cuda({**env, "MXFP4_MOE_TOOLCHAIN": "pypi"}, [site], MANIFEST.archs).origin == "packages"
    with pytest.raises(BuildError, match=r"MXFP4_MOE_TOOLCHAIN=pypi, but .* no packaged nvcc: pip install \"cuda-too"):
        resolve_cuda({**env, "MXFP4_MOE_TOOLCHAIN": "pypi"}, [tmp_path], MANIFEST.archs)
    with pytest.raises(BuildError, match="MXFP4_MOE_TOOLCHAIN: expected 'pypi' or nothing, got 'conda'"):
        resolve_cuda({**env, "MXFP4_MOE_TOOLCHAIN": "conda"}, [site], MANIFEST.archs)


def test_the_newest_package_is_taken(tmp_path: Path) -> None:
    for major in (9, 13, 14):
        fake_toolkit(tmp_path / "nvidia" / f"cu{major}", f"{major}.0")
    assert resolve_cuda({"PATH": "/usr/bin:/bin"}, [tmp_path], MANIFEST.archs).version == (14, 0, 88)


def test_a_wrapper_script_on_path_leads_to_its_toolkit(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "toolkit", lib="targets/x86_64-linux/lib")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    found = resolve_cuda({"PATH": f"{wrapper.parent}:/usr/bin:/bin"}, [], MANIFEST.archs)
    assert found.nvcc == wrapper
    assert found.cudart == root / "targets" / "x86_64-linux" / "lib" / "libcudart.so.13"


def test_no_compiler_at_all_is_one_sentence_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as error:
        resolve_cuda({"PATH": str(tmp_path)}, [tmp_path], MANIFEST.archs)
    assert str(error.value) == (
        'no CUDA compiler: set CUDA_HOME, put nvcc on PATH, or pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*" '
        "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def test_a_cuda_home_without_nvcc_is_not_passed_over(three: tuple[Mapping[str, str], Path], tmp_path: Path) -> None:
    env, site = three
    with pytest.raises(BuildError, match=r"CUDA_HOME is .*empty, which has no bin/nvcc: point it at a CUDA toolkit or"):
        resolve_cuda({**env, "CUDA_HOME": str(tmp_path / "empty")}, [site], MANIFEST.archs)


def test_an_old_compiler_is_refused_only_for_archs_it_lacks(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "old", "12.8")
    env = {"CUDA_HOME": str(root), "PATH": "/usr/bin:/bin"}
    with pytest.raises(BuildError) as error:
        resolve_cuda(env, [], MANIFEST.archs)
    assert str(error.value) == (
        f"nvcc 12.8.88 (CUDA_HOME: {root}/bin/nvcc) is too old for sm_120f, which needs CUDA 12.9 or newer: install a "
        'newer toolkit, or set MXFP4_MOE_TOOLCHAIN=pypi after pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"'
    )
    assert resolve_cuda(env, [], ["90a"]).version == (12, 8, 88)


def test_a_toolkit_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "a", cuobjdump=False)
    env = {"CUDA_HOME": str(root), "PATH": str(tmp_path)}
    with pytest.raises(BuildError, match="no cuobjdump in .*: pip install nvidia-cuda-cuobjdump"):
        resolve_cuda(env, [], MANIFEST.archs)
    # The packages' cuobjdump reads what any nvcc wrote.
    site = fake_toolkit(tmp_path / "site" / "nvidia" / "cu13").parents[1]
    assert resolve_cuda(env, [site], MANIFEST.archs).cuobjdump.is_relative_to(site)
    (root / "lib" / "libcudart.so.13").unlink()
    with pytest.raises(BuildError, match=r"has no libcudart\.so\.13: install the CUDA runtime library"):
        resolve_cuda(env, [site], MANIFEST.archs)


def test_nvcc_that_fails_or_babbles_is_quoted(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "a")
    (root / "bin" / "nvcc").write_text("#!/bin/sh\necho no licence >&2\nexit 3\n", encoding="utf-8")
    with pytest.raises(BuildError, match="nvcc: exit status 3: no licence"):
        resolve_cuda({"CUDA_HOME": str(root)}, [], MANIFEST.archs)
    with pytest.raises(BuildError, match="nvcc --version: no release in its output: 'hello'"):
        parse_nvcc_version("hello\n")


def test_cutlass_comes_from_the_package_or_from_the_named_folder(tmp_path: Path) -> None:
    packaged = tmp_path / "site" / "cutlass_library" / "source" / "include"
    named = tmp_path / "named"
    for include, minor in ((packaged, 2), (named, 5)):
        (include / "cutlass").mkdir(parents=True)
        (include / "cutlass" / "cutlass.h").touch()
        version = f"#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR {minor}\n#define CUTLASS_PATCH 0\n"
        (include / "cutlass" / "version.h").write_text(version, encoding="utf-8")
    site = [tmp_path / "site"]
    assert find_cutlass({}, site) == Headers(version="4.2.0", include_dirs=(packaged,))
    assert find_cutlass({"MXFP4_MOE_CUTLASS_INCLUDE": str(named)}, site).version == "4.5.0"
    with pytest.raises(BuildError, match="MXFP4_MOE_CUTLASS_INCLUDE is .*, which has no cutlass/cutlass.h"):
        find_cutlass({"MXFP4_MOE_CUTLASS_INCLUDE": str(tmp_path)}, site)
    with pytest.raises(BuildError, match=r"no CUTLASS headers: pip install nvidia-cutlass==\d"):
        find_cutlass({}, [tmp_path])


def test_torch_is_found_without_being_imported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    version = tmp_path / "torch" / "version.py"
    version.write_text("__version__ = '2.13.0+cpu'\n", encoding="utf-8")
    assert find_torch([tmp_path]).version == "2.13.0+cpu"
    version.write_text("__version__ = '2.9.1'\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"torch 2\.9\.1 is too old to build with, which needs 2\.10 or newer"):
        find_torch([tmp_path])
    with pytest.raises(BuildError, match=r"no torch in this environment: pip install torch=="):
        find_torch([tmp_path / "nothing"])


def test_the_host_compiler_is_gcc_or_cxx(tmp_path: Path) -> None:
    for name in ("g++", "my-g++"):
        (tmp_path / name).touch(mode=0o755)
    assert find_cxx({"PATH": str(tmp_path)}) == tmp_path / "g++"
    assert find_cxx({"PATH": str(tmp_path), "CXX": "my-g++"}) == tmp_path / "my-g++"
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: icc is not on PATH; install g\+\+ or set CXX"):
        find_cxx({"PATH": str(tmp_path), "CXX": "icc"})


def test_another_environments_packages_can_be_named(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    assert site in package_dirs({"MXFP4_MOE_BUILD_ENV": str(tmp_path)})
    assert site not in package_dirs({})
