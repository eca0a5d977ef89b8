"""The hazard check of SM12x's machine code: what it lets pass and what it refuses, and that it sees a hazard.

tests/test_release_verbs.py runs it over the whole wheel, as a part of the audit.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest
from release_tools import run, tools

import mxfp4_moe
from wheelbuild import ROOT, BuildError
from wheelbuild.release.hazards import Accepted, Finding, Seen, Warned, judge, load_accepted, parse_accepted
from wheelbuild.toolchain import package_dirs, resolve_cuda

# ---- what is let pass ------------------------------------------------------------------------------------------------

WARNING = Finding(
    error=False,
    kind="understalled",
    producer="LDSM.16.M88.4",
    consumer="QMMA.SF",
    cycles=50,
    scoreboards=frozenset({"LDS"}),
    words="LDSM at 0x10, then QMMA.SF at 0x20: 50 of 57 cycles",
)
ENTRY = Warned(
    kind="understalled",
    producer="LDSM.16.M88.4",
    consumers=("HMMA", "QMMA.SF"),
    at_most=2,
    reason="a later load is waited for",
    fewest_cycles=40,
    scoreboard_of=("LDS", "LDSM"),
)
ACCEPTED = Accepted(warnings=(ENTRY,), unknown={"FENCE": "no registers"})


def seen(*findings: Finding, unknown: str = "FENCE", dependencies: int = 7) -> Seen:
    return Seen(instructions=1000, dependencies=dependencies, findings=findings, unknown=frozenset(unknown.split()))


def test_listed_warnings_and_opcodes_pass_and_are_counted() -> None:
    assert judge("x.whl", [seen(WARNING), seen(WARNING, unknown="")], ACCEPTED) == (
        "x.whl: 2 kernels for sm_120, 2,000 instructions, 14 dependencies: no error, 2 warnings of 1 kinds, each "
        "listed in ci/hazards.toml; opcodes unknown to the checker: FENCE"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "overwritten-before-read"},
        {"producer": "LDSM.16.M88.2"},
        {"consumer": "QMMA"},
        {"cycles": 39},
        {"scoreboards": frozenset({"LDG"})},
    ],
)
def test_another_warning_is_refused(changes: dict[str, object]) -> None:
    sentence = (
        "^x.whl: a warning that ci/hazards.toml does not list: LDSM at 0x10, then .*; find out whether it is a hazar"
    )
    with pytest.raises(BuildError, match=sentence):
        judge("x.whl", [seen(WARNING, dataclasses.replace(WARNING, **changes))], ACCEPTED)  # type: ignore[arg-type]


def test_an_error_is_refused_even_where_its_like_is_listed() -> None:
    with pytest.raises(
        BuildError, match="^x.whl: a hazard in the machine code: LDSM at 0x10, then QMMA.SF at 0x20: 50 "
    ):
        judge("x.whl", [seen(WARNING, dataclasses.replace(WARNING, error=True))], ACCEPTED)


def test_more_of_a_kind_than_were_looked_at_are_refused() -> None:
    with pytest.raises(
        BuildError, match="^x.whl: 3 warnings of LDSM.16.M88.4 before HMMA or QMMA.SF, at most 2 allowed"
    ):
        judge("x.whl", [seen(WARNING, WARNING), seen(WARNING)], ACCEPTED)


def test_an_opcode_that_neither_the_checker_nor_the_list_knows_is_refused() -> None:
    with pytest.raises(
        BuildError, match="^x.whl: the hazard checker does not know UBLKCP; see what it reads and writes"
    ):
        judge("x.whl", [seen(unknown="FENCE UBLKCP")], ACCEPTED)


def test_a_check_that_checked_nothing_is_refused() -> None:
    with pytest.raises(BuildError, match="^x.whl: the hazard checker found no dependency to check in 1 kernels$"):
        judge("x.whl", [seen(dependencies=0)], ACCEPTED)


def test_the_list_gives_a_reason_for_each() -> None:
    accepted = load_accepted()
    assert all(len(warned.reason) > 20 and warned.consumers and warned.at_most > 0 for warned in accepted.warnings)
    assert all(accepted.unknown.values())
    pairs = [(warned.kind, warned.producer, name) for warned in accepted.warnings for name in warned.consumers]
    assert len(pairs) == len(set(pairs))
    with pytest.raises(BuildError, match="ci/hazards.toml: not what wheelbuild.release.hazards reads: .*at_most"):
        parse_accepted('[[warning]]\nkind = "x"\nproducer = "y"\nconsumers = ["z"]\nreason = "r"\n[unknown]\n')


def test_what_plop3_reads_is_not_written_by_it() -> None:
    """It writes two predicates and reads three."""
    from wheelbuild.release.hazards import _only_reads

    assert _only_reads("PLOP3", "P3, PT, PT, PT, UP3, 0x80, 0x8", "UP3")
    assert not _only_reads("PLOP3", "P3, PT, PT, PT, UP3, 0x80, 0x8", "P3")
    assert not _only_reads("PLOP3", "P3, P1, P3, PT, !UP2, 0x80, 0x8", "P3")
    assert _only_reads("UPLOP3", "UP1, UPT, UPT, UPT, !UP2, 0x80, 0x8", "UP2")
    assert _only_reads("VOTEU", "UP6, P1", "P1")
    assert not _only_reads("VOTEU", "UP6, P1", "UP6")
    assert not _only_reads("ISETP", "P3, PT, R1, UR3, UP3", "UP3")


# ---- that it sees a hazard -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine code of the wheel's smallest tile."""
    folder = tmp_path_factory.mktemp("cubin")
    library = Path(mxfp4_moe.__file__).parent / "_ext" / "tile_m64n8.abi3.so"
    command = [str(cuobjdump()), "-xelf", "sm_120", str(library)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (path,) = (found for found in folder.glob("*.cubin") if b"sm_120f_mxfp4_mxfp8" in found.read_bytes())
    return path


def cuobjdump() -> Path:
    return resolve_cuda(os.environ, package_dirs(os.environ), ["120f"]).cuobjdump


def checked(path: Path) -> tuple[int, str]:
    result = run(tools() / "python", "-m", "wheelbuild.release.hazards", path, env={"PYTHONPATH": str(ROOT)})
    return result.returncode, result.stdout


def with_control(path: Path, opcode: str, clear: int, then: int, folder: Path) -> Path:
    """A copy in which the first instruction `opcode` that has any bits of `clear` in the upper half of its code, where
    the control bits are, has `then` in their place.
    """
    listing = subprocess.run([str(cuobjdump()), "-sass", str(path)], check=True, capture_output=True, text=True).stdout
    pattern = rf"\*/\s+{re.escape(opcode)}[^;]*;\s+/\* 0x(\w{{16}}) \*/\s+/\* 0x(\w{{16}}) \*/"
    data = path.read_bytes()
    for low, high in re.findall(pattern, listing):
        old = bytes.fromhex(low)[::-1] + bytes.fromhex(high)[::-1]
        if int(high, 16) & clear and data.count(old) == 1:
            new = old[:8] + (int(high, 16) & ~clear | then).to_bytes(8, "little")
            copy = folder / path.name
            copy.write_bytes(data.replace(old, new))
            return copy
    raise AssertionError(f"no {opcode} with these control bits")


STALL, WAIT = 0xF << 41, 0x3F << 52  # cycles until the next instruction issues; a mask of scoreboards to wait for first


def test_ptxass_own_code_passes(cubin: Path) -> None:
    status, said = checked(cubin)
    assert status == 0, said
    assert re.search(
        r"cubin: 1 kernels for sm_120, \d+ instructions, \d+ dependencies: no error, \d+ warnings of", said
    )


@pytest.mark.parametrize(
    ("opcode", "clear", "then", "sentence"),
    [
        (
            "SHF.R.W.U32",
            STALL,
            1 << 41,
            r"a hazard in the machine code: SHF\.R\.W\.U32 .*, then LOP3.*: 3 of 4 cycles\.",
        ),
        ("LDG.E", WAIT, 0, r"a hazard in the machine code: LDC.*, then LDG.*on at least one path nothing waits on it"),
        ("QMMA.SF", WAIT, 0, r"a warning that ci/hazards\.toml does not list: LDSM.*, then QMMA\.SF.*of 57 cycles\."),
    ],
    ids=["an ALU's result", "a constant's load", "activations, for which no later load is waited for either"],
)
def test_code_that_does_not_wait_is_refused(
    opcode: str, clear: int, then: int, sentence: str, cubin: Path, tmp_path: Path
) -> None:
    status, said = checked(with_control(cubin, opcode, clear, then, tmp_path))
    assert status == 1
    assert re.match(f"error: {re.escape(cubin.name)}: {sentence}", said), said
