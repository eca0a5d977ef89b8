"""The words in which a wrong argument is refused."""

from __future__ import annotations

import pytest
import torch

from mxfp4_moe._arguments import describe, require_contiguous, require_tensor

WORDS = torch.zeros(4, 2, dtype=torch.uint8)


def test_require_tensor_names_what_is_wrong() -> None:
    with pytest.raises(TypeError, match=r"^w13: expected uint8 \[4, K\], got list$"):
        require_tensor("w13", [1], torch.uint8, (4, "K"))
    with pytest.raises(TypeError, match=r"^w13: expected uint8 \[4, K\], got int8 \[4, 2\]$"):
        require_tensor("w13", torch.zeros(4, 2, dtype=torch.int8), torch.uint8, (4, "K"))
    with pytest.raises(ValueError, match=r"^w13: expected uint8 \[4, K\], got uint8 \[3, 2\]$"):
        require_tensor("w13", torch.zeros(3, 2, dtype=torch.uint8), torch.uint8, (4, "K"))
    with pytest.raises(ValueError, match=r"^w13: expected uint8 \[4, K\] on meta, got uint8 \[4, 2\] on cpu$"):
        require_tensor("w13", WORDS, torch.uint8, (4, "K"), torch.device("meta"))
    require_tensor("w13", WORDS, torch.uint8, (4, "K"), torch.device("cpu"))


def test_require_contiguous_shows_the_strides() -> None:
    require_contiguous("w13", WORDS)
    with pytest.raises(ValueError, match=r"^w13: expected a contiguous tensor, got strides \[1, 2\]$"):
        require_contiguous("w13", WORDS.T)


def test_describe_is_dtype_and_shape() -> None:
    assert describe(torch.empty(2, 0, 3, dtype=torch.bfloat16)) == "bfloat16 [2, 0, 3]"
