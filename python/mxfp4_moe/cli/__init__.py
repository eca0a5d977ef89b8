"""The command `mxfp4-moe`: one module per subcommand, each with HELP, add_arguments(parser) and run(arguments).

No module here imports torch at its top, so that a command which does not need it starts at once, and one that has to
say why torch does not work can.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import bench, bench_routers, doctor, info, inspect, output, probe, tiles, tune

_COMMANDS = {
    "info": info,
    "inspect": inspect,
    "tiles": tiles,
    "probe": probe,
    "doctor": doctor,
    "bench": bench,
    "bench-routers": bench_routers,
    "tune": tune,
}


CANNOT_WRITE = 74  # exit status: EX_IOERR of sysexits.h
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; 2 and a usage line for arguments that make no sense.

    Standard output that is closed or full is one sentence and status 74; a reader that has seen enough, such as `head`,
    is none and status 0. Ctrl-C is status 130, without words.
    """
    with output.checked() as failure:
        try:
            try:
                return _run(arguments)
            finally:
                sys.stdout.flush()  # also behind --help, which ends by SystemExit
        except BrokenPipeError:
            return 0
        except output.OutputError as error:
            failure(f"mxfp4-moe: standard output cannot be written ({error})")
            return CANNOT_WRITE
        except KeyboardInterrupt:
            return INTERRUPTED


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="mxfp4-moe", description="What is in this wheel, whether it works here, and how fast."
    )
    parser.add_argument("--version", action="version", version=f"mxfp4-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    parsed = parser.parse_args(arguments)
    status: int = _COMMANDS[parsed.command].run(parsed)
    return status
