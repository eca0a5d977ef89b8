"""The package's problems and layers (mxfp4_moe/problems.py), and the GPU. For tests/gpu and tests/gpu/sanitizer.py."""

from __future__ import annotations

import torch

from mxfp4_moe._install import wheel
from mxfp4_moe.problems import (
    ROWS_PER_EXPERT,
    Call,
    GemmProblem,
    bits,
    layout_problem,
    offsets_of,
    random_call,
    random_problem,
    random_weights,
    relative_error,
)

__all__ = [
    "EMULATED",
    "ROWS_PER_EXPERT",
    "Call",
    "GemmProblem",
    "bits",
    "fewer",
    "gpu",
    "layout_problem",
    "offsets_of",
    "random_call",
    "random_problem",
    "random_weights",
    "relative_error",
]


# A wheel whose MMA takes some thousand instructions (ci/build-emulated.sh): what takes seconds otherwise takes minutes.
EMULATED = wheel.emulated_on() is not None


def fewer(count: int) -> int:
    """How many of something a long test has: a quarter where the MMA is emulated, at least one."""
    return max(1, count // 4) if EMULATED else count


def gpu() -> torch.device:
    """The GPU under test. Asked for and not there is a failure, never a skip."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"a GPU test needs a GPU and a CUDA build of torch, got torch {torch.__version__} with none")
    return torch.device("cuda", torch.cuda.current_device())
