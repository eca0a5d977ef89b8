"""ci/wheelbuild without a compiler: settings, toolchain, plan and graph."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wheelbuild import ROOT, BuildError
from wheelbuild.graph import available_memory, find_ninja, graph_text, job_counts
from wheelbuild.plan import CompileJob, Plan, plan
from wheelbuild.requirements import build_requirements
from wheelbuild.settings import Settings, read_settings
from wheelbuild.thresholds import Thresholds
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import (
    Cuda,
    Headers,
    Toolchain,
    Torch,
    find_cutlass,
    find_cxx,
    find_torch,
    package_dirs,
    parse_nvcc_version,
    resolve_cuda,
)
from wheelbuild.versions import load_versions

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")
MOE_SOURCES = [Path("csrc/moe/route.cu"), Path("csrc/moe/operators.cpp")]

TOOLCHAIN = Toolchain(
    cuda=Cuda(
        origin="CUDA_HOME",
        version=(13, 0, 88),
        nvcc=Path("/cuda/bin/nvcc"),
        include_dirs=(Path("/cuda/include"),),
        cudart=Path("/cuda/lib/libcudart.so.13"),
        cuobjdump=Path("/cuda/bin/cuobjdump"),
    ),
    cutlass=Headers(version="4.2.0", include_dirs=(Path("/cutlass/include"),)),
    torch=Torch(version="2.13.0", include_dirs=(Path("/torch/include"),), library_dir=Path("/torch/lib")),
    python=Headers(version="3.11", include_dirs=(Path("/python/include"),)),
    cxx=Path("/usr/bin/g++"),
    cxx_version="g++ 12",
)

THRESHOLDS = Thresholds(instructions_per_mma={"120f": {"m128n128": 3.5}}, peak_mb=2000, wheel_bytes=12_000_000)


def settings(**env: str) -> Settings:
    return read_settings(env, MANIFEST)


def make_plan(chosen: Settings | None = None, folder: str = "build/x/ninja", toolchain: Toolchain = TOOLCHAIN) -> Plan:
    return plan(chosen or settings(), toolchain, THRESHOLDS, MOE_SOURCES, Path(folder))


def by_name(made: Plan) -> dict[str, CompileJob]:
    return {job.name: job for job in made.jobs}


# ---- settings --------------------------------------------------------------------------------------------------------


def test_without_environment_the_release_wheel_is_built() -> None:
    chosen = settings()
    assert chosen.profile == "mxfp4_minimal"
    assert chosen.tiles == MANIFEST.tiles
    assert chosen.archs == MANIFEST.archs
    assert chosen.max_jobs is None
    assert chosen.local("cu130") == "cu130"
    assert chosen.build_folder("cu130") == "mxfp4_minimal-cu130"


def test_filters_choose_in_the_manifests_order() -> None:
    chosen = settings(MXFP4_MOE_TILES=" m8n128_swap, m128n128 ", MXFP4_MOE_ARCHS="120f", MAX_JOBS="3")
    assert chosen.tiles == tuple(tile for tile in MANIFEST.tiles if tile.name in ("m128n128", "m8n128_swap"))
    assert len(chosen.tiles) == 2
    assert chosen.archs == ("120f",)
    assert chosen.max_jobs == 3
    assert chosen == settings(MXFP4_MOE_TILES="m128n128,m8n128_swap", MXFP4_MOE_ARCHS="120f", MAX_JOBS="3")


def test_a_filter_that_names_everything_filters_nothing() -> None:
    everything = ",".join(tile.name for tile in MANIFEST.tiles)
    assert settings(MXFP4_MOE_TILES=everything, MXFP4_MOE_ARCHS="120f,90a") == settings()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MXFP4_MOE_BUILD_PROFILE": "fast"}, "'fast' is not in the manifest, which has mxfp4_minimal, full"),
        ({"MXFP4_MOE_TILES": "m128n128,m1n1"}, "'m1n1' is not in the manifest, which has m"),
        ({"MXFP4_MOE_ARCHS": "120"}, "'120' is not in the manifest, which has 90a, 120f"),
        ({"MAX_JOBS": "0"}, "expected a positive integer, got '0'"),
        ({"MAX_JOBS": "many"}, "expected a positive integer, got 'many'"),
    ],
)
def test_unknown_settings_are_refused_with_the_list(env: dict[str, str], message: str) -> None:
    (variable,) = env
    with pytest.raises(BuildError, match=f"^{variable}: {message}"):
        settings(**env)


def test_different_builds_share_neither_folder_nor_wheel_name() -> None:
    builds = [
        settings(),
        settings(MXFP4_MOE_BUILD_PROFILE="full"),
        settings(MXFP4_MOE_TILES="m128n128"),
        settings(MXFP4_MOE_TILES="m64n128"),
        settings(MXFP4_MOE_ARCHS="90a"),
        settings(MXFP4_MOE_ARCHS="120f"),
        settings(MXFP4_MOE_BUILD_PROFILE="full", MXFP4_MOE_TILES="m128n128"),
    ]
    labels = ("cu130", "cu131")
    assert len({build.build_folder(label) for build in builds for label in labels}) == 2 * len(builds)
    versions = {build.local(label) for build in builds for label in labels}
    assert len(versions) == 2 * len(builds)
    assert all(re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", version) for version in versions)
    assert settings(MXFP4_MOE_LOCAL_VERSION="mine", MXFP4_MOE_TILES="m128n128").local("cu130") == "mine"


# ---- versions --------------------------------------------------------------------------------------------------------


def test_pyproject_builds_with_what_the_version_file_says() -> None:
    versions = load_versions()
    requirements = build_requirements()
    assert f"torch=={versions.torch_build}" in requirements
    assert versions.cuda[0].requirement in requirements
    assert all(version.label == "cu" + version.toolkit.replace(".", "") for version in versions.cuda)
    assert len({version.label for version in versions.cuda}) == len(versions.cuda)


def test_archs_are_listed_in_the_manifest_only() -> None:
    data = json.loads((ROOT / "ci" / "cuda-versions.json").read_text(encoding="utf-8"))
    assert not [arch for arch in MANIFEST.archs if arch in json.dumps(data)]


# ---- toolchain -------------------------------------------------------------------------------------------------------


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


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_has_every_tile_for_every_arch() -> None:
    made = make_plan()
    jobs = by_name(made)
    assert len(jobs) == len(made.jobs), "names are unique"
    assert len({job.output for job in made.jobs}) == len(made.jobs), "no two jobs write one file"
    assert made.modules == (*(tile.module for tile in MANIFEST.tiles), "moe")
    for tile in MANIFEST.tiles:
        nvcc = made.jobs_of(tile.module, "nvcc")
        assert [job.archs for job in nvcc] == [(arch,) for arch in MANIFEST.archs]
        for job in nvcc:
            assert f"-DLOGICAL_TILE_M={tile.m}" in job.command
            assert f"-DLOGICAL_TILE_N={tile.n}" in job.command
            assert f"-DSWAP_AB={int(tile.swap_ab)}" in job.command
            assert f"-DMXFP4_MOE_ARCH={job.archs[0]}" in job.command
        (op,) = made.jobs_of(tile.module, "cxx")
        assert f"-DTILE_NAME={tile.name}" in op.command
        assert "-DMXFP4_MOE_FOR_EACH_ARCH(X)=X(90a) X(120f)" in op.command
        (link,) = made.jobs_of(tile.module, "link")
        assert link.output == made.library(tile.module)
        assert set(link.inputs) == {job.output for job in (*nvcc, op)}
        (check,) = made.jobs_of(tile.module, "check")
        assert check.inputs == (link.output,)
    (load,) = made.jobs_of("extensions", "load")
    assert load.inputs == tuple(made.library(module) for module in made.modules)
    assert len(made.jobs) == len(MANIFEST.tiles) * (len(MANIFEST.archs) + 3) + len(MOE_SOURCES) + 3


def test_machine_code_only_and_each_arch_once() -> None:
    for job in make_plan().jobs:
        if job.kind == "nvcc":
            generated = [word for word in job.command if word.startswith("arch=")]
            assert generated == [f"arch=compute_{arch},code=sm_{arch}" for arch in job.archs]
            assert not [word for word in job.command if "code=compute" in word]


def test_jobs_come_after_what_they_need() -> None:
    made = make_plan()
    outputs = {job.output for job in made.jobs}
    done: set[Path] = set()
    for job in made.jobs:
        assert all(path in done for path in job.inputs if path in outputs)
        done.add(job.output)


def test_the_plan_is_a_pure_function_of_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = make_plan()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MXFP4_MOE_TILES", "m128n128")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert make_plan() == first
    assert graph_text(make_plan(), 2) == graph_text(first, 2)
    assert not list(tmp_path.iterdir())


def test_the_order_of_sources_does_not_matter() -> None:
    assert plan(settings(), TOOLCHAIN, THRESHOLDS, MOE_SOURCES[::-1], Path("build/x/ninja")) == make_plan()


def test_a_filter_leaves_the_other_tiles_out_and_these_jobs_alike() -> None:
    everything = by_name(make_plan())
    filtered = make_plan(settings(MXFP4_MOE_TILES="m128n128"))
    assert filtered.modules == ("tile_m128n128", "moe")
    for job in filtered.jobs:
        assert job == everything[job.name] or job.kind == "load"
    one_arch = make_plan(settings(MXFP4_MOE_ARCHS="120f"))
    assert not [word for job in one_arch.jobs for word in job.command if "90a" in word]


def test_changing_one_tiles_row_changes_that_tiles_commands_and_the_common_load_only() -> None:
    removed, *rest = MANIFEST.tiles
    fewer = dataclasses.replace(settings(), tiles=tuple(rest))
    before = {job.output: job.command for job in make_plan().jobs}
    after = {job.output: job.command for job in make_plan(fewer).jobs}
    differing = {path.name for path in before if before[path] != after.get(path)}
    assert after.keys() < before.keys()
    assert differing == {job.output.name for job in make_plan().jobs if job.module == removed.module} | {"load.json"}


def expected(made: Plan, module: str, kind: str) -> dict[str, Any]:
    (job,) = made.jobs_of(module, kind)
    data: dict[str, Any] = json.loads(job.command[job.command.index("--expect") + 1])
    return data


def test_loading_is_compared_with_the_proof() -> None:
    expect = expected(make_plan(), "extensions", "load")
    assert set(expect) == {*(tile.module for tile in MANIFEST.tiles), "moe"}
    for tile in MANIFEST.tiles:
        assert expect[tile.module]["ops"] == [f"mxfp4_moe::grouped_gemm_{tile.name}"]
        assert expect[tile.module]["facts"] == {arch: tiles.prove(tile, arch).facts() for arch in MANIFEST.archs}
    assert expect["moe"] == {}


def test_the_check_knows_what_the_main_loop_must_hold() -> None:
    made = make_plan()
    # A warp's 64 x 32 of (128, 128): 4 x 4 MMAs of m16n8k32; 64 rows of 32 bytes of activations, in 8 x 16 bytes, and
    # 32 rows of weights, of which a lane has a word of every eighth.
    loads = {"matrices_per_step": 16, "words_per_step": 4, "words_per_load": 4}
    assert expected(made, "tile_m128n128", "check") == {
        "compile": {"peak_mb": 2000},
        "main_loop": {
            "90a": {"opcode": "HMMA", "mma_per_step": 32, "limit": None} | loads,
            "120f": {"opcode": "QMMA.SF", "mma_per_step": 16, "limit": 3.5} | loads,
        },
    }
    # Swapped (8, 128): 8 rows of activations; 32 of weights on SM90, in 2 x 1 MMAs of two HMMA, on SM12x 64, in 4 x 1.
    swapped = expected(made, "tile_m8n128_swap", "check")["main_loop"]
    loads = {"matrices_per_step": 2, "words_per_step": 4, "words_per_load": 4}
    assert swapped["90a"] == {"opcode": "HMMA", "mma_per_step": 4, "limit": None} | loads
    loads = {"matrices_per_step": 2, "words_per_step": 8, "words_per_load": 4}
    assert swapped["120f"] == {"opcode": "QMMA.SF", "mma_per_step": 4, "limit": None} | loads
    # 16 rows of weights per warp of swapped (8, 64), 8 of (64, 8): two words side by side, and one.
    narrow = [expected(made, name, "check")["main_loop"]["120f"] for name in ("tile_m8n64_swap", "tile_m64n8")]
    assert [(loop["words_per_step"], loop["words_per_load"]) for loop in narrow] == [(2, 2), (1, 1)]
    assert "main_loop" not in expected(made, "moe", "check")


def test_a_threshold_of_one_tile_reruns_that_tiles_check_only() -> None:
    before = {job.output: job.command for job in make_plan().jobs}
    tighter = dataclasses.replace(THRESHOLDS, instructions_per_mma={"120f": {"m128n128": 3.0}})
    after = plan(settings(), TOOLCHAIN, tighter, MOE_SOURCES, Path("build/x/ninja"))
    assert [job.name for job in after.jobs if before[job.output] != job.command] == ["tile_m128n128.check"]


def test_no_folder_of_this_machine_reaches_the_libraries() -> None:
    for job in make_plan().jobs:
        if job.kind in ("nvcc", "cxx"):
            maps = [word for word in ",".join(job.command).split(",") if word.startswith("-ffile-prefix-map=")]
            assert f"-ffile-prefix-map={ROOT}=." in maps
            assert "-ffile-prefix-map=/cutlass/include=cutlass" in maps
        if job.kind == "link":
            assert not [word for word in job.command if "rpath" in word]


# ---- graph -----------------------------------------------------------------------------------------------------------


def standing_in(folder: Path, jobs: Mapping[str, tuple[str, ...]]) -> Plan:
    """A plan whose commands are these, in place of compilers; a name is also the name of the file that it makes."""
    made = tuple(
        CompileJob(
            name=name,
            kind="check" if name.endswith(".check.json") else "link",
            module=name.split(".")[0],
            archs=(),
            inputs=(),
            implicit=(),
            output=folder / name,
            record=None,
            depfile=None,
            command=command,
        )
        for name, command in jobs.items()
    )
    return Plan(jobs=made, modules=(), tiles=MANIFEST.tiles[:1], archs=MANIFEST.archs, folder=folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Mapping[str, tuple[str, ...]]], None]:
    from wheelbuild import graph

    monkeypatch.setattr(graph, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "ci"))
    return lambda jobs: graph.run_plan(standing_in(Path("build/x"), jobs), 1)


Runner = Callable[[Mapping[str, tuple[str, ...]]], None]


def test_progress_counts_jobs_and_tiles(run: Runner, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = {"tile_m64n128.link": ("touch", "build/x/tile_m64n128.link")}
    jobs["tile_m64n128.check.json"] = ("touch", "build/x/tile_m64n128.check.json")
    run(jobs)
    out = capfd.readouterr().out
    assert "tiles: 1, of which up to date: 0" in out
    assert re.search(r"\[ +\d+ s\] job 1 of 2, tile [01] of 1: tile_m64n128: ", out)
    assert re.search(r"\[ +\d+ s\] job 2 of 2, tile 1 of 1: tile_m64n128: ", out)
    assert (tmp_path / "build/x/tile_m64n128.link").exists()
    run(jobs)
    out = capfd.readouterr().out
    assert "tiles: 1, of which up to date: 1" in out
    assert "job 1" not in out


def test_a_changed_command_runs_again_and_nothing_else(run: Runner, tmp_path: Path) -> None:
    def jobs(word: str) -> dict[str, tuple[str, ...]]:
        return {
            "a.so": (sys.executable, "-c", f"open('build/x/a.so', 'a').write('{word}')"),
            "b.so": (sys.executable, "-c", "open('build/x/b.so', 'a').write('b')"),
        }

    for word in ("1", "1", "2"):
        run(jobs(word))
    assert (tmp_path / "build/x/a.so").read_text() == "12"
    assert (tmp_path / "build/x/b.so").read_text() == "b"


def test_a_refusal_is_the_builds_last_word(run: Runner) -> None:
    refuse = (sys.executable, "-c", "print('refused: x.abi3.so is not right'); raise SystemExit(1)")
    with pytest.raises(BuildError, match=r"^x\.abi3\.so is not right$"):
        run({"x.check.json": refuse})
    with pytest.raises(BuildError, match=r"y\.so failed \(exit status 1\); what it said is above"):
        run({"y.so": ("false",)})


def test_a_command_is_passed_through_the_shell_unharmed(run: Runner, tmp_path: Path) -> None:
    words = ["a b", "$HOME", "$$", "X(90a) X(120f)", '{"a": "b"}', "it's", ":", "*"]
    program = "import json, sys; open('build/x/w.so', 'w').write(json.dumps(sys.argv[1:]))"
    run({"w.so": (sys.executable, "-c", program, *words)})
    assert json.loads((tmp_path / "build/x/w.so").read_text()) == words


def test_ninja_accepts_the_whole_graph(tmp_path: Path) -> None:
    made = make_plan(folder="ninja")
    (tmp_path / "build.ninja").write_text(graph_text(made, 2), encoding="utf-8")
    command = [find_ninja(), "-C", str(tmp_path), "-t", "targets", "all"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for job in made.jobs:
        assert f"{job.output}: {'compile' if job.depfile else 'run'}" in result.stdout


def test_jobs_are_bounded_by_cores_memory_and_request() -> None:
    gigabyte = 1024**3
    assert job_counts(2, 24 * gigabyte, None) == (2, 2)
    assert job_counts(64, 24 * gigabyte, None) == (64, 12)
    assert job_counts(64, 24 * gigabyte, 3) == (3, 3)
    assert job_counts(4, gigabyte, None) == (4, 1)
    assert job_counts(4, 64 * gigabyte, 100) == (4, 4)


def test_memory_is_the_systems_or_the_containers(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2048 kB\n")
    assert available_memory(tmp_path) == 2 * 1024**2
    cgroup = tmp_path / "sys" / "fs" / "cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("100\n")
    assert available_memory(tmp_path) == 2 * 1024**2
    (cgroup / "memory.max").write_text("1100\n")
    assert available_memory(tmp_path) == 1000


def test_a_job_records_its_cost_and_hides_ptxas_chatter(tmp_path: Path) -> None:
    record = tmp_path / "out.json"
    program = (
        "x = bytearray(200_000_000); print('ptxas info    : Used 12 registers'); print('a warning'); "
        "print('    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads')"
    )
    command = [sys.executable, "-m", "wheelbuild.job", str(record), sys.executable, "-c", program]
    env = os.environ | {"PYTHONPATH": str(ROOT / "ci")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0
    assert result.stdout == "a warning\n"
    data = json.loads(record.read_text())
    assert data["peak_mb"] >= 190
    assert 0 <= data["cpu_seconds"] < 60
    assert 0 < data["wall_seconds"] < 60
    assert "Used 12 registers" in data["output"]

    failing = [*command[:4], sys.executable, "-c", "print('ptxas info'); raise SystemExit(7)"]
    result = subprocess.run(failing, capture_output=True, text=True, check=False, env=env)
    assert (result.returncode, result.stdout) == (7, "ptxas info\n")


# ---- tools ----------------------------------------------------------------------------------------------------------


def test_pre_commit_runs_the_versions_of_the_dev_extra() -> None:
    pinned = re.search(r"^dev = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for requirement in re.findall(r"\[([^\]]+==[^\]]+)\]", hooks):
        assert f'"{requirement}"' in pinned[1]
