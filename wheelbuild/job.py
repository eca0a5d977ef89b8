"""Runs one compiler command and records what it cost and what it said: `python -m wheelbuild.job RECORD COMMAND...`

ptxas speaks at length when asked for registers and spills (-Xptxas -v); that goes into the record, and only what a
person needs to read (warnings, errors) to the terminal.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

_PTXAS_INFO = re.compile(r"ptxas info|\s+\d+ bytes stack frame,|\s*$")


def main(record: Path, command: list[str]) -> int:
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wall = time.monotonic() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    for line in result.stdout.splitlines():
        if result.returncode != 0 or not _PTXAS_INFO.match(line):
            print(line)
    if result.returncode == 0:
        cost = {
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "wall_seconds": round(wall, 2),
            "peak_mb": round(usage.ru_maxrss / 1024),  # of the largest process, which ru_maxrss is about
            "output": result.stdout,
        }
        record.write_text(json.dumps(cost), encoding="utf-8")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
