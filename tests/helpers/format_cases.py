"""Random bytes and floats for the tests of formats."""

from __future__ import annotations

import numpy as np
import torch


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def with_neighbours(values: np.ndarray) -> np.ndarray:
    """The values, the floats just above and below, and all their negatives."""
    values = values.astype(np.float32)
    near = np.concatenate((values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))))
    return np.concatenate((near, -near))


def random_float_bits(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
