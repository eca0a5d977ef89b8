"""What chooses the contents of a wheel, and the versions that it is built with."""

from __future__ import annotations

import json
import re

import pytest
from build_cases import MANIFEST, settings

from wheelbuild import ROOT, BuildError
from wheelbuild.requirements import build_requirements
from wheelbuild.versions import load_versions


def test_without_environment_the_release_wheel_is_built() -> None:
    chosen = settings()
    assert chosen.profile == "full"
    assert chosen.tiles == MANIFEST.tiles
    assert chosen.archs == MANIFEST.archs
    assert chosen.max_jobs is None
    assert chosen.local("cu130") == "cu130"
    assert chosen.build_folder("cu130") == "full-cu130"


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
        settings(MXFP4_MOE_BUILD_PROFILE="mxfp4_minimal"),
        settings(MXFP4_MOE_TILES="m128n128"),
        settings(MXFP4_MOE_TILES="m64n128"),
        settings(MXFP4_MOE_ARCHS="90a"),
        settings(MXFP4_MOE_ARCHS="120f"),
        settings(MXFP4_MOE_BUILD_PROFILE="mxfp4_minimal", MXFP4_MOE_TILES="m128n128"),
    ]
    labels = ("cu130", "cu131")
    assert len({build.build_folder(label) for build in builds for label in labels}) == 2 * len(builds)
    versions = {build.local(label) for build in builds for label in labels}
    assert len(versions) == 2 * len(builds)
    assert all(re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", version) for version in versions)
    assert settings(MXFP4_MOE_LOCAL_VERSION="mine", MXFP4_MOE_TILES="m128n128").local("cu130") == "mine"


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


def test_pre_commit_runs_the_versions_of_the_dev_extra() -> None:
    pinned = re.search(r"^dev = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for requirement in re.findall(r"\[([^\]]+==[^\]]+)\]", hooks):
        assert f'"{requirement}"' in pinned[1]
