"""The self-test: every tile of the installed wheel, on the GPU that is here. Seconds, not minutes.

It asks four questions of each tile (checks.py makes the problems):

- layout: is every value where it belongs? Problems whose partial sums are exact in any plausible arithmetic, so bits
  must be equal.
- accuracy: is every sum within the bound that any plausible arithmetic keeps (accuracy.py)?
- agreement: do all tiles, output types and batch sizes give the same bits?
- arithmetic: are the bits those of the architecture's published rule (arithmetic.py)?

A tile that fails one of the first three is blocked. One that only adds up by another rule than the published one
passes, and the report says which rule explains its results, in a line made to be pasted into an issue.

A tile that is wrong for a GPU may do more than compute wrongly: an illegal instruction ends the CUDA context, a missing
barrier never returns. So tiles run in a worker process (`python -m mxfp4_moe._health.selftest TILE ...`, worker.py),
which is started anew behind a tile that took it down (parent.py). All but checks.py need the standard library alone.
"""

from .outcome import NotRunError, Outcome, RunTile
from .parent import START_SECONDS, TILE_SECONDS, agree, record, run, worker_command
from .report import BLOCKING, Arithmetic, Report, Status, TileResult
from .worker import main, prepare_gpu, work

__all__ = [
    "BLOCKING",
    "START_SECONDS",
    "TILE_SECONDS",
    "Arithmetic",
    "NotRunError",
    "Outcome",
    "Report",
    "RunTile",
    "Status",
    "TileResult",
    "agree",
    "main",
    "prepare_gpu",
    "record",
    "run",
    "work",
    "worker_command",
]
