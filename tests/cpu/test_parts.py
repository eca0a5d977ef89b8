"""One rank's part of a layer: cut wherever blocks and experts allow, in memory of its own."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxfp4_moe import MoEWeights, fused_moe
from mxfp4_moe._checkpoints.options import shard_of

E, H, INTER, T, K = 7, 64, 224, 11, 3  # seven experts, seven blocks of 32
TOLERANCE = 1e-2  # as test_parallel.py has it, with the reason


def whole(**options: Any) -> MoEWeights:
    return MoEWeights.from_mxfp4(**oracles.random_checkpoint(E, H, INTER), **options)


def call(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    topk_weights, topk_ids = torch.randn(T, E, generator=g).softmax(-1).topk(K)
    return torch.randn(T, H, generator=g).bfloat16(), topk_weights, topk_ids


@pytest.mark.parametrize(
    ("kind", "total", "multiple", "size", "blocks"),
    [
        ("tp", 2880, 32, 4, [23, 23, 22, 22]),
        ("tp", 2880, 32, 8, [12, 12, 11, 11, 11, 11, 11, 11]),
        ("tp", 2880, 32, 3, [30, 30, 30]),
        ("tp", 768, 32, 5, [5, 5, 5, 5, 4]),
        ("ep", 32, 1, 3, [11, 11, 10]),
        ("ep", 384, 1, 7, [55, 55, 55, 55, 55, 55, 54]),
        ("ep", 4, 1, 4, [1, 1, 1, 1]),
    ],
)
def test_shares(kind: str, total: int, multiple: int, size: int, blocks: list[int]) -> None:
    parts = [shard_of(kind, rank, size, total, multiple) for rank in range(size)]
    assert [(end - begin) // multiple for begin, end in parts] == blocks


@given(units=st.integers(1, 300), size=st.integers(1, 300), multiple=st.sampled_from([1, 32]))
def test_every_unit_has_one_owner(units: int, size: int, multiple: int) -> None:
    if size > units:
        with pytest.raises(ValueError, match="_size: expected 1 to"):
            shard_of("tp", 0, size, units * multiple, multiple)
        return
    parts = [shard_of("tp", rank, size, units * multiple, multiple) for rank in range(size)]
    assert [begin for begin, _ in parts[1:]] == [end for _, end in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == (0, units * multiple)
    lengths = [end - begin for begin, end in parts]
    assert all(length % multiple == 0 for length in lengths)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] in (0, multiple)


@pytest.mark.parametrize("activation", ["swiglu_oai", "relu2"])
@pytest.mark.parametrize(("ep_size", "tp_size"), [(2, 1), (3, 1), (5, 1), (1, 2), (1, 3), (1, 6), (4, 5), (7, 7)])
def test_the_ranks_sum_to_the_layer(ep_size: int, tp_size: int, activation: str) -> None:
    checkpoint = oracles.random_checkpoint(E, H, INTER, gated=activation != "relu2")
    weights = MoEWeights.from_mxfp4(**checkpoint, activation=activation)
    x, topk_weights, topk_ids = call()
    expected = fused_moe(x, topk_weights, topk_ids, weights).double()
    total = torch.zeros_like(expected)
    for ep in range(ep_size):
        for tp in range(tp_size):
            part = weights.expert_parallel(ep, ep_size).tensor_parallel(tp, tp_size)
            names = {"ep_rank": ep, "ep_size": ep_size, "tp_rank": tp, "tp_size": tp_size}
            alone = MoEWeights.from_mxfp4(**checkpoint, activation=activation, **names)
            assert torch.equal(alone.w13, part.w13)
            assert torch.equal(alone.w2, part.w2)
            assert (alone.first_expert, alone.num_global_experts) == (part.first_expert, E)
            total += fused_moe(x, topk_weights, topk_ids, part).double()
    assert float((total - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("tp_size", [2, 3, 4, 5, 6])
def test_the_parts_are_the_checkpoint(tp_size: int) -> None:
    """gpt-oss's own width over any number of ranks; bytes, no arithmetic."""
    checkpoint = oracles.random_checkpoint(1, 32, 2880)
    weights = MoEWeights.from_mxfp4(**checkpoint)
    parts = [weights.tensor_parallel(rank, tp_size).to_mxfp4() for rank in range(tp_size)]
    for name, dim in {"w13": 1, "w13_scale": 1, "w13_bias": 1, "w2": 2, "w2_scale": 2}.items():
        assert torch.equal(
            torch.cat([getattr(part, name) for part in parts], dim), checkpoint[name].to(getattr(parts[0], name).dtype)
        )
    assert [part.w2_bias is not None for part in parts] == [True] + [False] * (tp_size - 1)


def limits() -> torch.Tensor:
    return torch.arange(1.0, 1.0 + E)


PARTS: dict[str, Callable[[], MoEWeights]] = {
    "one expert": lambda: whole().expert_parallel(3, E),
    "uneven experts": lambda: whole().expert_parallel(1, 3),
    "a shard": lambda: whole().tensor_parallel(2, 3),
    "a shard of one expert": lambda: whole().expert_parallel(2, E).tensor_parallel(1, 7),
    "numbers for each expert": lambda: whole(limit=limits(), alpha=limits()).expert_parallel(5, E),
    "all of it": whole,
    "views of something larger": lambda: dataclasses.replace(
        whole(), w13=whole().w13[:2], w2=whole().w2[:2], w13_bias=None, w2_bias=torch.randn(E, H)[3:5]
    ),
}


def stored_bytes(kind: str, part: MoEWeights) -> int:
    if kind == "pickle":
        return len(pickle.dumps(part))
    if kind == "torch.save":
        file = io.BytesIO()
        torch.save(part, file)
        return file.tell()
    again = copy.deepcopy(part) if kind == "deepcopy" else part
    return sum(t.untyped_storage().nbytes() for t in vars(again).values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", ["pickle", "torch.save", "deepcopy", "memory"])
def test_a_part_is_stored_alone(name: str, kind: str) -> None:
    part = PARTS[name]()
    needed = sum(t.nbytes for t in vars(part).values() if isinstance(t, torch.Tensor))
    overhead = 0 if kind in ("deepcopy", "memory") else 4096  # names, and the containers' own
    if (name, kind) != ("views of something larger", "memory"):  # that memory is the caller's
        assert needed <= stored_bytes(kind, part) <= needed + overhead


@pytest.mark.parametrize("name", PARTS)
def test_what_was_stored_comes_back(name: str) -> None:
    part = PARTS[name]()
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part), torch.load(file, weights_only=False)):
        for field in dataclasses.fields(MoEWeights):
            was, got = getattr(part, field.name), getattr(again, field.name)
            assert torch.equal(was, got) if isinstance(was, torch.Tensor) else was == got


def test_a_part_does_not_keep_the_whole_alive() -> None:
    weights = whole()
    part = weights.expert_parallel(2, 3)
    before = part.w13.clone()
    weights.w13.zero_()
    assert torch.equal(part.w13, before)
    assert weights.expert_parallel(0, 1) is weights
    assert weights.tensor_parallel(0, 1) is weights
