"""What all files of tests/gpu share."""

from __future__ import annotations

from pathlib import Path

import gpu_problems
import pytest
import torch

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs a GPU, whether its file says so or not."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    return gpu_problems.gpu()
