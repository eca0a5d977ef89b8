"""Folders of any name: where the sources are, the toolkit, and temporary files."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from build_cases import THRESHOLDS, TOOLCHAIN, make_plan, settings

from wheelbuild import ROOT, BuildError, graph
from wheelbuild.plain_paths import PlainPaths, make_links, require_quotable
from wheelbuild.plan import plan
from wheelbuild.toolchain import Toolchain, package_dirs, resolve_toolchain

ODD = {
    "space": "my projects",
    "comma": "a,b",
    "quote": "it's",
    "double quote": 'the "best"',
    "parenthesis": "wheel (1)",
    "colon": "c:d",
    "equals": "a=b",
    "semicolon": "a;b",
    "ampersand": "a&b",
    "star": "a*b",
    "hash": "#1",
    "tilde": "~me",
    "percent": "100%",
    "braces": "{a,b}",
    "letters of other languages": "größe",
}
ALL = "we ird, (a):b'c\"d=e"


@pytest.mark.parametrize("name", ODD)
def test_an_odd_part_goes_behind_a_link(tmp_path: Path, name: str) -> None:
    odd = tmp_path / ODD[name] / "toolkit"
    (odd / "bin").mkdir(parents=True)
    (odd / "bin" / "nvcc").touch()
    plain = PlainPaths(Path("build/x/links"))
    path = plain(odd / "bin" / "nvcc")
    assert path.parts[:3] == ("build", "x", "links")
    assert path.parts[4:] == ("toolkit", "bin", "nvcc"), "nvcc finds its parts beside the name that it is called by"
    assert set(str(path)) <= set("abcdefghijklmnopqrstuvwxyz0123456789/")
    assert plain(odd / "bin").parts[:4] == path.parts[:4], "one link for all that is below"
    assert plain(odd.parent.parent) == odd.parent.parent, "a plain path stays as it is"
    make_links(plain.links, tmp_path)
    assert (tmp_path / path).samefile(odd / "bin" / "nvcc")


def test_links_are_made_anew_where_they_lead_elsewhere(tmp_path: Path) -> None:
    plain = PlainPaths(Path("links"))
    link = plain(Path("/a b"))
    place = tmp_path / link
    place.parent.mkdir()
    for make in (lambda: place.symlink_to("/elsewhere"), lambda: place.write_text("a file")):
        place.unlink(missing_ok=True)
        make()
        make_links(plain.links, tmp_path)
        assert os.readlink(place) == "/a b"
    before = place.lstat()
    make_links(plain.links, tmp_path)
    assert place.lstat() == before, "a link that is right is left alone"


@pytest.mark.parametrize("character", ["$", "`", "\\", "\n"])
def test_what_a_shell_reads_inside_of_quotes_is_refused(character: str) -> None:
    with pytest.raises(
        BuildError, match=r"^the source tree is in '.*', and nvcc hands that path to a shell, .* build in"
    ):
        require_quotable(Path(f"/home/me/a{character}b"))


@pytest.mark.parametrize("name", ODD)
def test_other_names_are_not(name: str) -> None:
    require_quotable(Path("/home/me") / ODD[name])


def moved(path: Path) -> Path:
    return Path("/home") / ALL / path.relative_to("/")


def test_a_plan_has_no_odd_word_where_everything_is_in_an_odd_folder() -> None:
    tools = dataclasses.replace(
        TOOLCHAIN,
        cuda=dataclasses.replace(
            TOOLCHAIN.cuda,
            nvcc=moved(TOOLCHAIN.cuda.nvcc),
            include_dirs=tuple(map(moved, TOOLCHAIN.cuda.include_dirs)),
            cudart=moved(TOOLCHAIN.cuda.cudart),
            cuobjdump=moved(TOOLCHAIN.cuda.cuobjdump),
        ),
        cutlass=dataclasses.replace(TOOLCHAIN.cutlass, include_dirs=tuple(map(moved, TOOLCHAIN.cutlass.include_dirs))),
        torch=dataclasses.replace(
            TOOLCHAIN.torch,
            include_dirs=tuple(map(moved, TOOLCHAIN.torch.include_dirs)),
            library_dir=moved(TOOLCHAIN.torch.library_dir),
        ),
        python=dataclasses.replace(TOOLCHAIN.python, include_dirs=tuple(map(moved, TOOLCHAIN.python.include_dirs))),
        cxx=moved(TOOLCHAIN.cxx),
    )
    made = make_plan(toolchain=tools)
    assert set(made.links.values()) == {Path("/home") / ALL}
    for job in made.jobs:
        if job.kind in ("nvcc", "cxx", "link"):
            words = [word for word in job.command if not word.startswith(("-DMXFP4_MOE_FOR_EACH_KERNEL", "-Wl,", "-l"))]
            odd = [word for word in words if any(character in word for character in " '\"():")]
            assert not odd, (job.name, odd)
            assert ALL not in " ".join(job.command)
    assert not make_plan().links, "nor has one of plain folders a link"


@pytest.fixture(scope="module")
def tools() -> Toolchain:
    return resolve_toolchain({**os.environ, "MXFP4_MOE_TOOLCHAIN": "pypi"}, ["120f"])


def compiled(root: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Objects of a kernel and of a host source, by the plan's own commands, run as ninja runs them."""
    sources = [Path("csrc/moe/finalize.cu"), Path("csrc/moe/layer.cpp")]
    shutil.copytree(ROOT / "csrc", root / "csrc")
    made = plan(settings(MXFP4_MOE_ARCHS="120f"), tools, THRESHOLDS, sources, Path("build/x/ninja"))
    jobs = [job for job in made.jobs if job.kind in ("nvcc", "cxx") and job.module == "moe"]
    text = graph.graph_text(dataclasses.replace(made, jobs=tuple(jobs)), 1)
    (root / made.folder).mkdir(parents=True)
    (root / made.folder / "build.ninja").write_text(text, encoding="utf-8")
    make_links(made.links, root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [graph.find_ninja(), "-f", str(made.folder / "build.ninja"), "-j1"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert "no work to do" in again.stdout, "the headers that were read are known by their names"
    return [(root / job.output).read_bytes() for job in jobs]


def test_objects_are_the_same_in_every_folder(
    tmp_path: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources, toolkit, headers and temporary files in folders whose names have everything."""
    plain = compiled(tmp_path / "plain", tools, monkeypatch)
    odd = tmp_path / ALL
    (odd / "temporary").mkdir(parents=True)
    for name, target in {"cuda": tools.cuda.nvcc.parents[1], "cutlass": tools.cutlass.include_dirs[0]}.items():
        (odd / name).symlink_to(target)
    monkeypatch.setenv("CUDA_HOME", str(odd / "cuda"))
    monkeypatch.setenv("MXFP4_MOE_CUTLASS_INCLUDE", str(odd / "cutlass"))
    monkeypatch.setenv("TMPDIR", str(odd / "temporary"))
    found = resolve_toolchain({**os.environ, "MXFP4_MOE_TOOLCHAIN": ""}, ["120f"])
    assert found.cuda.nvcc == odd / "cuda" / "bin" / "nvcc"
    assert compiled(odd / "tree", found, monkeypatch) == plain


@pytest.mark.parametrize("name", ["space", "quote", "double quote", "colon"])
def test_the_verbs_run_from_odd_folders(tmp_path: Path, name: str) -> None:
    """What every script of ci/ begins with: it finds the sources, their Python programs and the versions."""
    root = tmp_path / ODD[name]
    for folder in ("ci", "wheelbuild", "python"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "_ext"))
    shutil.copy(ROOT / "tile_manifest.toml", root)
    line = (
        f"source {shlex.quote(str(root / 'ci/common.sh'))}; versions_get \"['torch_build']\"; "
        'module "$(find_python)" wheelbuild.versions labels; echo "$run_env"'
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, check=False, env=env, cwd="/")
    assert result.returncode == 0, result.stderr
    torch, *labels, run_env = result.stdout.splitlines()
    assert torch[0].isdigit()
    assert labels[0].startswith("cu")
    assert ":" not in run_env, "venv refuses such a path"
    assert package_dirs(os.environ)
