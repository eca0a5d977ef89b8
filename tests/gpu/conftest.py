"""Fixtures that several files of tests/gpu use."""

from __future__ import annotations

import gpu_problems
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    return gpu_problems.gpu()
