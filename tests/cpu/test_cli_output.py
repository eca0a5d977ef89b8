"""Where the command cannot go on as it wants: stdout that is closed, full or left, Ctrl-C, no temporary folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mxfp4_moe import cli
from mxfp4_moe._health import environment
from mxfp4_moe.cli import doctor, output

PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
COMMANDS = ["info", "tiles", "tiles --json", "probe --list", "doctor --json", "--version", "--help", "bench --help"]


def shell(redirected: str, command: str = "info") -> subprocess.CompletedProcess[str]:
    """The command with its output redirected by a shell."""
    line = f'exec "{sys.executable}" -m mxfp4_moe.cli {command} {redirected}'
    env = os.environ | PATHS
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence_and_its_own_status(command: str) -> None:
    result = shell("> /dev/full", command)
    assert result.returncode == cli.CANNOT_WRITE == 74
    assert result.stderr == "mxfp4-moe: standard output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_stdout_is_one_sentence_and_its_own_status(command: str) -> None:
    result = shell(">&-", command)
    assert result.returncode == cli.CANNOT_WRITE
    assert result.stderr == "mxfp4-moe: standard output cannot be written (it is closed)\n"


def test_where_nothing_can_be_said_the_status_says_it() -> None:
    assert shell(">&- 2>&-").returncode == cli.CANNOT_WRITE
    assert shell("> /dev/full 2> /dev/full").returncode == cli.CANNOT_WRITE
    assert shell("2>&-").stdout.startswith("mxfp4-moe")


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    line = f'"{sys.executable}" -m mxfp4_moe.cli probe --list | head -n 1; echo "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=os.environ | PATHS)
    assert result.stdout.splitlines()[1] == "0"
    assert result.stderr == ""


def test_usage_stays_usage() -> None:
    assert shell(">&-", "nonsense").returncode == 2


def test_the_stream_is_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    assert cli.main(["info"]) == 0
    assert sys.stdout is before
    assert capsys.readouterr().out.startswith("mxfp4-moe")


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        raise OSError(28, "No space left on device", "cache.json")

    monkeypatch.setattr(cli._COMMANDS["info"], "run", run)
    with pytest.raises(OSError, match=r"cache\.json"):
        cli.main(["info"])
    with output.checked(), pytest.raises(output.OutputError, match="it is closed"):
        output._Output(None).write("words")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

DOCTOR = (
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from mxfp4_moe.cli import main\n"
    "sys.exit(main(['doctor']))"
)


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli._COMMANDS["info"], "run", lambda arguments: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        assert cli.main(["info"]) == cli.INTERRUPTED == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_while_torch_is_looked_at_leaves_no_process(tmp_path: Path) -> None:
    """Only the doctor gets the signal, as from a supervisor; a terminal sends it to its children too."""
    marker = tmp_path / "started"
    (tmp_path / "torch.py").write_text(
        f"import os, time\nopen({str(marker)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(marker)!r} + '.new', {str(marker)!r})\ntime.sleep(300)\n"
    )
    paths = os.pathsep.join([str(tmp_path), PATHS["PYTHONPATH"]])
    with subprocess.Popen(
        [sys.executable, "-c", DOCTOR],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    ) as process:
        deadline = time.monotonic() + 120
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert said == ("", "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


# ---- no temporary folder ---------------------------------------------------------------------------------------------

NO_FOLDER = "[Errno 2] No usable temporary directory found in ['/tmp', '/var/tmp', '/usr/tmp', '/']"


def test_the_doctor_without_a_temporary_folder_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise FileNotFoundError(NO_FOLDER)

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    assert cli.main(["doctor", "--json", "--selftest"]) == 2
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    for subject in ("torch", "self-test"):
        assert "no folder for temporary files can be written" in findings[subject]["text"]
        assert NO_FOLDER in findings[subject]["text"]
        assert findings[subject]["next_step"] == "set TMPDIR to a folder that can be written and has space"
    assert not [finding for finding in findings.values() if "reinstall the wheel" in finding["next_step"]]


def test_these_are_pythons_words(tmp_path: Path) -> None:
    program = (
        "import os, tempfile\n"
        "tempfile._os.open = lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, 'no'))\n"
        "tempfile.TemporaryFile()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert "No usable temporary directory found in [" in last
    assert doctor.cannot_run(last).next_step.startswith("set TMPDIR")
    assert "reinstall" in doctor.cannot_run("ZeroDivisionError").next_step
    assert tempfile.gettempdir()
