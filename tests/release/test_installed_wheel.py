"""The installed wheel as ci/check_install.py and the doctor see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from release_cases import built_wheel, changed
from release_tools import run

import mxfp4_moe
from mxfp4_moe._install import loading
from mxfp4_moe._install import wheel as _wheel
from wheelbuild import ROOT


def test_the_installed_wheel_is_whole_and_answers() -> None:
    """ci/check_install.py is what ci/test-wheel.sh runs in an empty environment; here in this one."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "ci" / "check_install.py", built_wheel()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd="/",
    )
    assert result.returncode == 0, result.stdout
    assert "files as in the wheel" in result.stdout


def test_an_install_with_another_file_is_noticed(tmp_path: Path) -> None:
    other = changed(built_wheel(), tmp_path, "mxfp4_moe/routing.py", lambda data: data + b"#")
    result = run(sys.executable, "-W", "ignore", ROOT / "ci" / "check_install.py", other)
    assert result.returncode == 1
    assert "error: mxfp4_moe/routing.py is installed with other contents than the wheel's" in result.stdout


def test_the_readmes_example_runs() -> None:
    result = run(sys.executable, "-W", "ignore", "ci/run_readme.py")
    assert result.returncode == 0, result.stdout
    assert "out: torch.bfloat16 [16, 128]" in result.stdout


def test_verbs_refuse_what_is_no_wheel(tmp_path: Path) -> None:
    for name in ("repair", "audit", "test-wheel"):
        result = run("bash", f"ci/{name}.sh", tmp_path / "none.whl")
        assert result.returncode == 1
        assert f"error: expected a wheel, got {tmp_path}/none.whl" in result.stdout
        result = run("bash", f"ci/{name}.sh", env={"MXFP4_MOE_DIST": str(tmp_path)})
        assert f"error: expected a wheel, got none, and there is none in {tmp_path}" in result.stdout


@pytest.fixture
def two_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "mxfp4_moe"
    package.mkdir()
    for name in ("mxfp4_moe-0.1.0+cu135", "mxfp4_moe_cu13-0.1.0"):
        (tmp_path / f"{name}.dist-info").mkdir()
    monkeypatch.setattr(_wheel, "PACKAGE", package)
    return package


def test_one_owner_is_no_conflict(two_owners: Path) -> None:
    (two_owners.parent / "mxfp4_moe_cu13-0.1.0.dist-info").rmdir()
    (two_owners.parent / "mxfp4_moe_extras-1.0.dist-info").mkdir()
    (two_owners.parent / "mxfp4_moe_other_cu13-1.0.dist-info").mkdir()
    assert _wheel.conflict() is None


def test_two_owners_are_named_with_the_remedy(two_owners: Path) -> None:
    assert _wheel.conflict() == (
        f"mxfp4-moe 0.1.0+cu135 and mxfp4-moe-cu13 0.1.0 are both installed in {two_owners.parent}, and one has "
        "overwritten the other's files: pip uninstall mxfp4-moe mxfp4-moe-cu13, then install the one for your CUDA "
        "version"
    )


def test_two_owners_mean_that_no_machine_code_is_loaded(two_owners: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(
        loading.LoadError, match=r"_ext\.moe is not loaded: mxfp4-moe 0\.1\.0\+cu135 and mxfp4-moe-cu13 "
    ):
        loading._import("moe")


def test_two_owners_are_told_of_by_import_and_doctor(tmp_path: Path) -> None:
    """A copy of the installed package, beside which a second distribution is installed."""
    site = tmp_path / "site"
    with zipfile.ZipFile(built_wheel()) as archive:
        archive.extractall(site)
    (site / "mxfp4_moe_cu12-9.9.dist-info").mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}
    program = "import warnings; warnings.simplefilter('always'); import mxfp4_moe; print(mxfp4_moe.__file__)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert str(site) in told.stdout
    assert "RuntimeWarning: mxfp4-moe" in told.stderr
    assert "mxfp4-moe-cu12 9.9 are both installed in" in told.stderr
    command = [sys.executable, "-W", "ignore", "-m", "mxfp4_moe.cli", "doctor", "--json"]
    doctor = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert doctor.returncode == 2, doctor.stderr
    findings: list[dict[str, Any]] = json.loads(doctor.stdout)["findings"]
    (error,) = [finding for finding in findings if finding["level"] == "error"]
    assert "are both installed in" in error["text"]
    assert error["next_step"].startswith("pip uninstall mxfp4-moe mxfp4-moe-cu12")


def test_the_tests_own_install_has_one_owner() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _wheel.conflict() is None
        assert mxfp4_moe.__version__ == _wheel.version()
