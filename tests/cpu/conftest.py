"""Fixtures that several files of tests/cpu use."""

from __future__ import annotations

import oracles
import pytest
import torch
from weight_cases import E, H, I


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    return oracles.random_checkpoint(E, H, I, seed=7)
