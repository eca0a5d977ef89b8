"""ci/wheelbuild without a compiler: settings, toolchain, plan, graph, and reading what the tools print."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from wheelbuild import ROOT, BuildError
from wheelbuild.check import check_code, check_load, check_paths
from wheelbuild.graph import available_memory, find_ninja, graph_text, job_counts
from wheelbuild.machine_code import Code, Instruction, Resources, parse_ptxas, parse_sass
from wheelbuild.plan import CompileJob, Plan, plan
from wheelbuild.requirements import build_requirements
from wheelbuild.settings import Settings, read_settings
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
MOE_SOURCES = [Path("csrc/moe/route.cu"), Path("csrc/moe/ops.cpp")]

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


def settings(**env: str) -> Settings:
    return read_settings(env, MANIFEST)


def make_plan(chosen: Settings | None = None, folder: str = "build/x/ninja", toolchain: Toolchain = TOOLCHAIN) -> Plan:
    return plan(chosen or settings(), toolchain, MOE_SOURCES, Path(folder))


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
    assert [tile.name for tile in chosen.tiles] == ["m128n128", "m8n128_swap"]
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
        ({"MXFP4_MOE_TILES": "m128n128,m1n1"}, "'m1n1' is not in the manifest, which has m64n128, m128n128, "),
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
    assert len(made.jobs) == len(MANIFEST.tiles) * (len(MANIFEST.archs) + 3) + len(MOE_SOURCES) + 2


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
    assert plan(settings(), TOOLCHAIN, MOE_SOURCES[::-1], Path("build/x/ninja")) == make_plan()


def test_a_filter_leaves_the_other_tiles_out_and_these_jobs_alike() -> None:
    everything = by_name(make_plan())
    filtered = make_plan(settings(MXFP4_MOE_TILES="m128n128"))
    assert filtered.modules == ("tile_m128n128", "moe")
    for job in filtered.jobs:
        assert job == everything[job.name]
    one_arch = make_plan(settings(MXFP4_MOE_ARCHS="120f"))
    assert not [word for job in one_arch.jobs for word in job.command if "90a" in word]


def test_changing_one_tiles_row_changes_that_tiles_commands_only() -> None:
    text = (ROOT / "tile_manifest.toml").read_text(encoding="utf-8")
    changed = tiles.parse_manifest(text.replace("m = 128\nn = 128", "m = 128\nn = 64"))
    before = {job.output: job.command for job in make_plan().jobs}
    after = {job.output: job.command for job in make_plan(read_settings({}, changed)).jobs}
    differing = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert differing
    assert all(name.startswith(("tile_m128n128.", "tile_m128n64.")) for name in differing)


def test_the_check_knows_what_the_proof_says() -> None:
    (check,) = make_plan().jobs_of("tile_m8n128_swap", "check")
    expect = json.loads(check.command[check.command.index("--expect") + 1])
    assert expect["ops"] == ["mxfp4_moe::grouped_gemm_m8n128_swap"]
    assert expect["facts"]["120f"] == tiles.prove(MANIFEST.tile("m8n128_swap"), "120f").facts()
    assert expect["opcodes"] == {"90a": "HMMA", "120f": "QMMA.SF"}
    assert expect["max_spill_bytes"] == {"90a": 64, "120f": 0}


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


# ---- reading machine code --------------------------------------------------------------------------------------------

PTXAS = """ptxas info    : 9 bytes gmem
ptxas info    : Compiling entry function '_Z3oneILi1EEvv' for 'sm_90a'
ptxas info    : Function properties for _Z3oneILi1EEvv
    72 bytes stack frame, 80 bytes spill stores, 76 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 72 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z3two' for 'sm_120f'
ptxas info    : Function properties for _Z3two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 60 registers, used 1 barriers, 128 bytes smem
"""

SASS = """
Fatbin elf code:
================
arch = sm_120f
code version = [1,8]

	code for sm_120
		Function : _Z3onev
	.headerflags	@"EF_CUDA_SM120"
        /*0000*/                   LDC R1, c[0x0][0x37c] ;          /* 0x0000df00ff017b82 */
                                                                    /* 0x000fe20000000800 */
        /*0010*/                   R2UR UR4, R9 ;
        /*0020*/                   QMMA.SF.16832.F32.E4M3.E2M1.E8 R4, R8, R12, R4, R20, R21, UR4 ;
        /*0030*/              @!UP1 PLOP3.LUT P0, PT, P1, PT, PT, 0x8, 0x0 ;
        /*0040*/               @P0 BRA.U.ANY 0x10 ;
        /*0050*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0060*/                   QMMA.SF.16832.F32.E4M3.E2M1.E8 R4, R8, R12, R4, R20, R21, URZ ;
        /*0070*/               @P1 BRA 0x50 ;
        /*0080*/                   UTMALDG.2D [UR8], [UR6] ;
        /*0090*/               @P0 BRA.U.ANY 0x80 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   NOP;

Fatbin elf code:
================
arch = sm_90a
		Function : _Z3twov
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0010*/                   EXIT ;
"""


def test_ptxas_is_read_per_kernel_and_arch() -> None:
    one, two = parse_ptxas(PTXAS)
    assert one == Resources(
        kernel="_Z3oneILi1EEvv", arch="90a", registers=168, stack_bytes=72, spill_store_bytes=80, spill_load_bytes=76
    )
    assert (two.kernel, two.arch, two.registers, two.spill_store_bytes) == ("_Z3two", "120f", 60, 0)


def test_instructions_are_counted_per_arch() -> None:
    code = parse_sass(SASS)
    assert sorted(code) == ["120f", "90a"]
    counts = code["120f"].counts()
    assert counts["total"] == 11
    assert (counts["QMMA"], counts["QMMA.SF"], counts["HMMA"], counts["LDSM"]) == (2, 2, 0, 1)
    assert (counts["R2UR"], counts["BRA.U.ANY"], counts["UTMALDG"]) == (1, 2, 1)
    assert code["90a"].counts()["HMMA"] == 1
    assert list(code["90a"].kernels) == ["_Z3twov"]


def test_a_waterfall_is_a_lane_loop_around_the_instruction() -> None:
    code = parse_sass(SASS)["120f"]
    assert code.waterfalls("QMMA.SF") == 1
    assert code.waterfalls("UTMALDG") == 1
    assert code.waterfalls("LDSM") == 0


# ---- what a library must show ----------------------------------------------------------------------------------------

EXPECT = {"ops": ["mxfp4_moe::grouped_gemm_x"], "facts": {"90a": {"stages": 3}, "120f": {"stages": 3}}}
LOADED = {
    "ops": ["mxfp4_moe::grouped_gemm_x"],
    "facts": {"90a": {"stages": 3}, "120f": {"stages": 3}},
    "entry": 1,
    "error": None,
}


def test_a_library_that_is_as_expected_passes() -> None:
    check_load("x.so", LOADED, EXPECT)
    check_load("moe.so", {**LOADED, "facts": None, "entry": None}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": ["mxfp4_moe::other"]}, "registers mxfp4_moe::other, expected exactly mxfp4_moe::grouped_gemm_x"),
        ({"ops": ["mxfp4_moe::grouped_gemm_x", "mxfp4_moe::other"]}, "registers .*other, expected exactly"),
        ({"ops": []}, "registers no operator of mxfp4_moe"),
        ({"error": "file too short"}, "cannot be loaded: file too short"),
        ({"entry": 0}, "has no address in its attribute 'entry'"),
        ({"facts": None}, r"has facts for archs None, expected \['120f', '90a'\]"),
        ({"facts": {"90a": {"stages": 3}}}, r"has facts for archs \['90a'\], expected \['120f', '90a'\]"),
        (
            {"facts": {"90a": {"stages": 3}, "120f": {"stages": 2}}},
            r"on sm_120f: stages is 2 in the compiled tile and 3 in the proof of tiles\.py",
        ),
        ({"facts": {"90a": {}, "120f": {}}}, "on sm_90a: stages is None in the compiled tile and 3"),
    ],
)
def test_a_library_that_is_not_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=rf"^x\.so .*{message}"):
        check_load("x.so", {**LOADED, **change}, EXPECT)


def code_of(kernel: str, *opcodes: str) -> Code:
    numbered = enumerate(opcodes)
    return Code(kernels={kernel: [Instruction(address=16 * n, opcode=op, target=None) for n, op in numbered]})


CODE = {"90a": code_of("a", "HMMA.16816.F32"), "120f": code_of("b", "QMMA.SF.16832.F32.E4M3.E2M1.E8")}
RESOURCES = [
    Resources(kernel=name, arch=arch, registers=168, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0)
    for name, arch in (("a", "90a"), ("b", "120f"))
]
OPCODES = {"90a": "HMMA", "120f": "QMMA.SF"}
SPILLS = {"90a": 64, "120f": 0}


def test_machine_code_that_is_as_expected_passes() -> None:
    check_code("x.so", CODE, RESOURCES, ["90a", "120f"], OPCODES, SPILLS)


def test_machine_code_that_is_not_is_refused() -> None:
    archs = ["90a", "120f"]
    with pytest.raises(BuildError, match="has machine code for sm_90a, expected sm_120f, sm_90a"):
        check_code("x.so", {"90a": CODE["90a"]}, RESOURCES, archs, OPCODES, SPILLS)
    with pytest.raises(BuildError, match="has machine code for no arch, expected"):
        check_code("x.so", {}, RESOURCES, archs, OPCODES, SPILLS)
    with pytest.raises(BuildError, match=r"on sm_120f: no QMMA\.SF among 1 instructions"):
        check_code(
            "x.so", {**CODE, "120f": code_of("b", "QMMA.16832.F32.E4M3.E4M3")}, RESOURCES, archs, OPCODES, SPILLS
        )
    with pytest.raises(BuildError, match="sm_90a and sm_120f share the kernel name a; "):
        check_code("x.so", {**CODE, "120f": code_of("a", "QMMA.SF.16832")}, RESOURCES, archs, OPCODES, SPILLS)
    spilling = [RESOURCES[0], dataclasses.replace(RESOURCES[1], spill_store_bytes=8, spill_load_bytes=4)]
    with pytest.raises(
        BuildError, match="on sm_120f: 168 registers are not enough, 8 bytes of spill stores and 4 of loads, at"
    ):
        check_code("x.so", CODE, spilling, archs, OPCODES, SPILLS)
    few = [dataclasses.replace(RESOURCES[0], spill_store_bytes=8, spill_load_bytes=64), RESOURCES[1]]
    check_code("x.so", CODE, few, archs, OPCODES, SPILLS)
    with pytest.raises(BuildError, match="on sm_120f: ptxas gave no account of registers and spills"):
        check_code("x.so", CODE, RESOURCES[:1], archs, OPCODES, SPILLS)
    waterfall = parse_sass(SASS)
    with pytest.raises(BuildError, match=r"on sm_120f: 1 loops over the lanes of a warp around QMMA\.SF"):
        check_code("x.so", waterfall, RESOURCES, archs, OPCODES, SPILLS)


def test_a_path_of_the_build_machine_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.write_bytes(b"\0csrc/tile/tile.cu\0")
    check_paths(library, [Path("/home/me")])
    library.write_bytes(b"\0/home/me/src/tile.cu\0more")
    with pytest.raises(BuildError, match=r"x\.so contains a path of the build machine: /home/me/src/tile\.cu$"):
        check_paths(library, [Path("/home/me")])


def test_pre_commit_runs_the_versions_of_the_dev_extra() -> None:
    pinned = re.search(r"^dev = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for requirement in re.findall(r"\[([^\]]+==[^\]]+)\]", hooks):
        assert f'"{requirement}"' in pinned[1]
