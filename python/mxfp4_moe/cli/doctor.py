"""What this install is, whether it works here, and what to do where it does not.

Exit status: 0 when all is well, 1 with a warning (such as no GPU, or a tile that is blocked or failed the self-test),
2 with an error (nothing works on this GPU, or a file is not what was built). Sums that are not by the published rule,
but by one that is known, are a note and leave 0; by none that is known, a warning.
"""

from __future__ import annotations

import argparse
import json
import sys

from .. import __version__
from .._health import selftest
from .._health.checks import arithmetic_finding, error, examine, ok, warning
from .._health.environment import gather
from .._health.findings import Finding, as_text, worst
from .._install import cache, wheel
from .._install.troubles import REINSTALL, Versions, recognize, words
from ..integrations._engines.findings import engine_findings

HELP = "what works here, what does not, and the self-test"

_SCHEMA = 2
_SELFTEST = "self-test"
_FROM_SELFTEST = (_SELFTEST, "arithmetic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run every tile on the GPU (seconds): layout, accuracy, agreement, arithmetic; block those that fail here",
    )
    parser.add_argument("--device", type=int, default=0, help="the GPU's number for --selftest, 0 by default")
    parser.add_argument("--verify", action="store_true", help="hash each library, and compare with the build's hashes")
    parser.add_argument("--json", action="store_true", help="the findings for machines")


def run(arguments: argparse.Namespace) -> int:
    report = None
    tested: list[Finding] = []
    if arguments.selftest:
        try:
            report, tested = run_selftest(arguments.device)
        except Exception as reason:
            tested = [cannot_run(words(reason))]
    env = gather(verify=arguments.verify)
    findings = [*examine(env), *engine_findings(env.driver.gpus if env.driver else ())]
    if tested:  # what has just been seen, in place of what is remembered
        findings = [*(finding for finding in findings if finding.subject not in _FROM_SELFTEST), *tested]
    level = worst(findings)
    if arguments.json:
        data = {
            "schema": _SCHEMA,
            "version": __version__,
            "worst": level.name.lower(),
            "findings": [finding.as_dict() for finding in findings],
            "selftest": report.as_dict() if report else None,
        }
        print(json.dumps(data, indent=1))
    else:
        print(as_text(findings, f"mxfp4-moe doctor, version {__version__}"))
        if report:
            print(f"\n{report.text()}")
    return int(level)


def cannot_run(message: str) -> Finding:
    """The self-test could not even be started."""
    trouble = recognize(message, Versions())
    if trouble is None:
        return error(_SELFTEST, f"cannot be run: {message}", REINSTALL)
    means, remedy = trouble.words(Versions())
    return error(_SELFTEST, f"cannot be run: {means} ({message})", remedy)


def run_selftest(device: int) -> tuple[selftest.Report, list[Finding]]:
    """Runs it with progress on stderr, remembers the result, and writes or removes the device's blocklist."""

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tiles = wheel.built_tiles()
    progress(f"self-test of {len(tiles)} tiles on GPU {device}: starting torch, computing what must come out")
    report = selftest.run(tiles, selftest.worker_command(device), progress=progress)
    findings = [_selftest_finding(report)]
    if line := report.arithmetic():
        findings.append(arithmetic_finding(line, explained=report.explained))
    try:
        selftest.record(report)
    except OSError as reason:
        step = f"set {cache.CACHE_DIR_VARIABLE} to a folder that can"
        findings.append(warning("blocklist", f"cannot be written: {reason}", step))
    return report, findings


def _selftest_finding(report: selftest.Report) -> Finding:
    if report.passed:
        sums = "" if report.others else ", with sums as published"
        return ok(_SELFTEST, f"all {len(report.results)} tiles passed{sums}")
    passed = len(report.having(selftest.Status.PASSED))
    if report.fault and not report.device:
        step = "the findings above say what is missing"
    else:
        step = "open an issue with this report" + ("; calls fall back to tiles that passed" if passed else "")
    text = f"{passed} of {len(report.results)} tiles passed" + (f": {report.fault}" if report.fault else "")
    return (warning if passed else error)(_SELFTEST, text, step)
