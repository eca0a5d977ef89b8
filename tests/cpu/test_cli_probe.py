"""`mxfp4-moe probe`: what it prints, in which forms, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mxfp4_moe import cli
from mxfp4_moe.probe import kernel, matrix, variants
from mxfp4_moe.probe.assemblers import Assembler
from mxfp4_moe.probe.run import TARGETS

Probe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a ptxas of its own."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [])


@pytest.fixture
def probe(alone: None, assemblers: dict[str, Assembler], capsys: pytest.CaptureFixture[str]) -> Probe:
    """Runs the command with the assemblers of these releases, all by default."""

    def run(*arguments: str, releases: list[str] | None = None) -> tuple[int, str, str]:
        named = [assembler.path for assembler in assemblers.values() if not releases or assembler.cuda in releases]
        status = cli.main(["probe", *arguments, *(word for path in named for word in ("--ptxas", str(path)))])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def probe_json(probe: Probe, *arguments: str, releases: list[str] | None = None) -> Any:
    status, out, err = probe(*arguments, "--json", releases=releases)
    assert (status, err) == (0, "")
    return json.loads(out)


def test_the_whole_matrix_for_machines(probe: Probe, assemblers: dict[str, Assembler]) -> None:
    data = probe_json(probe, releases=["12.9"])
    assert data["schema"] == 1
    path = next(str(assembler.path) for assembler in assemblers.values() if assembler.cuda == "12.9")
    assert data["toolkits"] == [{"version": "12.9.86", "ptx_isa": "8.8", "path": path, "found": "--ptxas"}]
    assert data["targets"] == list(TARGETS)
    assert matrix.from_json(data).variants == variants.load()


def test_the_matrix_for_people(probe: Probe) -> None:
    names = ("--instruction", "wgmma.fence", "--instruction", "mma*kind::mxf4.*m16n8k64*")
    status, out, _ = probe(*names, releases=["13.0"])
    assert status == 0
    scaled = "mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue8m0"
    lines = out.splitlines()
    assert lines[0] == "2 variants, ptxas 13.0.88 (PTX ISA 9.0)"
    head, row = (next(line for line in lines if line.startswith(start)) for start in ("mma ", scaled))
    assert head.split()[1:] == [target.removeprefix("sm_") for target in TARGETS]
    cells = dict(zip(TARGETS, row.split()[1:], strict=True))
    assert {target for target, cell in cells.items() if cell == "yes"} == {"sm_120a", "sm_120f", "sm_121a", "sm_121f"}
    note = next(line for line in lines if line.startswith(f"  {cells['sm_120']}: "))
    assert "Instruction 'mma with block scale' not supported on this target" in note
    assert out.count("Instruction 'wgmma.fence' not supported on this target") == 1


def test_toolkits_that_differ_have_rows_of_their_own_and_a_reason(probe: Probe) -> None:
    _, out, _ = probe("--category", "griddepcontrol", "--target", "sm_90a,sm_120f", releases=["12.8", "12.9"])
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "griddepcontrol.wait (CUDA 12.8) yes -" in rows
    assert "griddepcontrol.wait (CUDA 12.9) yes yes" in rows
    assert "  - CUDA 12.8 has no such target (sm_120f)" in out


def test_filters_combine(probe: Probe) -> None:
    data = probe_json(probe, "--category", "cvt", "--category", "mma", "--instruction", "e2m3", "--target", "sm_120f")
    assert {row["category"] for row in data["variants"]} == {"cvt", "mma"}
    assert all("e2m3" in row["name"] for row in data["variants"])
    assert data["targets"] == ["sm_120f"]


def test_markdown(probe: Probe) -> None:
    _, out, _ = probe("--category", "setmaxnreg", "--markdown", releases=["13.0"])
    assert "## setmaxnreg" in out
    assert (
        "| `setmaxnreg.inc.sync.aligned.u32` | 8.0 | yes | yes | yes | yes | no | yes | yes | no | yes | yes |" in out
    )


def test_the_list_asks_nobody(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--list", "--category", "wgmma"]) == 0
    *rows, _, count = capsys.readouterr().out.splitlines()
    assert count == f"{len(rows)} variants"
    assert all(row.startswith("wgmma  wgmma.") and "Asynchronous warpgroup-level" in row for row in rows)
    assert cli.main(["probe", "--list", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["variants"]] == [variant.name for variant in variants.load()]
    assert set(data["variants"][0]) == {"name", "category", "section", "isa", "ptx", "nowhere"}


def test_two_targets_side_by_side(probe: Probe) -> None:
    status, out, _ = probe("--diff", "sm_120f", "sm_120", "--category", "setmaxnreg", releases=["12.9", "13.0"])
    assert status == 0
    assert out.splitlines() == [
        "sm_120f and sm_120 differ in 2 variants",
        *(
            line
            for way in ("inc", "dec")
            for line in (
                f"setmaxnreg.{way}.sync.aligned.u32 (CUDA 12.9, CUDA 13.0)",
                "  sm_120f: accepted",
                f"  sm_120: refused: Instruction 'setmaxnreg.{way}' not supported on .target 'sm_120'",
            )
        ),
    ]
    _, out, _ = probe("--diff", "sm_120f", "sm_121f", releases=["13.0"])
    assert out == "sm_120f and sm_121f: no difference\n"


def test_two_toolkits_side_by_side(probe: Probe) -> None:
    data = probe_json(probe, "--diff", "12.8", "13.0", "--category", "griddepcontrol")
    assert (data["first"], data["second"]) == ("CUDA 12.8.93", "CUDA 13.0.88")
    assert {row["where"] for row in data["differences"]} == set(TARGETS) - {"sm_90a", "sm_100a", "sm_120", "sm_120a"}
    assert {row["second"]["status"] for row in data["differences"]} == {"accepted"}
    assert {row["first"]["status"] for row in data["differences"]} == {"n/a"}


def test_the_kernel(probe: Probe) -> None:
    status, out, _ = probe("--kernel", releases=["13.0"])
    assert status == 0
    head, *lines = out.splitlines()
    assert head.startswith("ptxas 13.0.88 (--ptxas: ")
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert list(said) == list(TARGETS)
    accepted = {"sm_90a", "sm_120a", "sm_120f", "sm_121a", "sm_121f"}
    assert {target for target, words in said.items() if words.startswith("yes: all ")} == accepted
    assert all("kind::mxf8f6f4.block_scale" in said[target] for target in set(TARGETS) - accepted)


def test_the_kernel_for_machines(probe: Probe) -> None:
    data = probe_json(probe, "--kernel", "--target", "sm_90a", "--target", "sm_121", releases=["12.8", "12.9"])
    assert set(data["paths"]) == set(kernel.load())
    old, new = (row["targets"] for row in data["toolkits"])
    assert old["sm_90a"] == {"kernel_path": "SM90", "status": "accepted", "first": "", "words": ""}
    assert (old["sm_121"]["status"], old["sm_121"]["first"]) == ("n/a", "")
    assert new["sm_121"]["status"] == "refused"
    assert "block_scale" in new["sm_121"]["first"]


def test_a_terminal_sees_progress_and_keeps_none_of_it(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, out, err = probe("--kernel", "--target", "sm_90a,sm_120f", releases=["13.0"])
    lines = err.split("\r")
    assert [line.strip() for line in lines] == ["", *(line.strip() for line in lines[1:3]), "", ""]
    assert {line.split(":")[0] for line in lines[1:3]} == {"1 of 2", "2 of 2"}
    assert {line.strip().split(": ")[1] for line in lines[1:3]} == {"CUDA 13.0, sm_90a", "CUDA 13.0, sm_120f"}
    assert len(lines[3]) >= len(lines[2].rstrip()), "blanks over what was written"
    assert "\r" not in out


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_no_ptxas_is_one_sentence_with_the_remedy(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mxfp4-moe probe: no ptxas: pip install nvidia-cuda-nvcc, or set CUDA_HOME")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "120f"], "--target: expected a name such as sm_120f, got '120f'"),
        (["--target", "sm_120f,"], "--target: expected a name such as sm_120f, got ''"),
        (["--instruction", "nonsense"], "no variant fits --category and --instruction; --list shows all"),
        (["--category", "cvt", "--instruction", "ldmatrix"], "no variant fits"),
        (["--diff", "13.0", "sm_120f"], "--diff: expected two toolkits, such as 12.9 13.0, or two targets"),
        (["--diff", "sm_120", "sm_120f", "--target", "sm_90a"], "--diff of two targets asks about these two"),
        (["--diff", "13.0", "11.8", "--category", "cvt"], "--diff: there is no ptxas 11.8 here, but 13.0.88"),
        (["--kernel", "--category", "cvt"], "--kernel asks about all of the kernel: leave out --category"),
        (["--kernel", "--markdown"], "--markdown is for the matrix"),
        (["--ptxas", "/nowhere/ptxas"], "--ptxas: there is no /nowhere/ptxas"),
    ],
)
def test_a_question_that_makes_no_sense(arguments: list[str], words: str, probe: Probe) -> None:
    status, out, err = probe(*arguments, releases=["13.0"])
    assert (status, out) == (2, "")
    assert err.startswith(f"mxfp4-moe probe: {words}")
    assert err.count("\n") == 1


def test_an_unknown_category_lists_those_there_are(probe: Probe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        probe("--category", "nonsense")
    assert caught.value.code == 2
    assert "ldmatrix" in capsys.readouterr().err


def test_a_broken_ptxas_on_the_path_is_said_and_left_out(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ptxas").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ptxas").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = probe("--category", "setmaxnreg", releases=["13.0"])
    assert (status, out.splitlines()[0]) == (0, "2 variants, ptxas 13.0.88 (PTX ISA 9.0)")
    assert err == f"mxfp4-moe probe: left out: {tmp_path}/ptxas is no ptxas: --version says ''\n"


def test_it_needs_no_torch(tmp_path: Path, assemblers: dict[str, Assembler]) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy here')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    path = str(list(assemblers.values())[-1].path)
    command = [sys.executable, "-m", "mxfp4_moe.cli", "probe", "--kernel", "--target", "sm_120f", "--ptxas", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert "sm_120f  yes: all" in result.stdout
