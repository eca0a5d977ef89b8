"""The command `mxfp4-moe`: one module per subcommand, each with HELP, add_arguments(parser) and run(arguments).

No module here imports torch at its top, so that a command which does not need it starts at once, and one that has to
say why torch does not work can.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import bench, bench_routers, doctor, info, inspect, probe, tiles, tune

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; 2 and a usage line for arguments that make no sense."""
    parser = argparse.ArgumentParser(
        prog="mxfp4-moe", description="What is in this wheel, whether it works here, and how fast."
    )
    parser.add_argument("--version", action="version", version=f"mxfp4-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    parsed = parser.parse_args(arguments)
    try:
        status: int = _COMMANDS[parsed.command].run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    return status
