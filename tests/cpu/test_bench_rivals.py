"""Inputs of the bench, and its rivals: found or absent with a reason, weights where they want them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import rival_stubs
import torch

from mxfp4_moe import MoEWeights, fused_moe_from_logits
from mxfp4_moe.bench import inputs, rivals, shapes
from mxfp4_moe.bench.rivals import Absent, Found, humming, marlin, packages, padded
from mxfp4_moe.problems import relative_error

LARGE, SMALL = shapes.PRESETS["gpt-oss-120b"], shapes.MoEShape(name="", experts=8, top_k=2, hidden=128, intermediate=64)


def test_no_rounding_changes_who_is_picked() -> None:
    for experts in (8, 32, 128, 200):
        shape = dataclasses.replace(SMALL, experts=experts, top_k=4)
        call = inputs.call_inputs(shape, 50, torch.device("cpu"), seed=1)
        assert torch.equal(call.logits, call.logits.bfloat16().float())
        assert all(len(set(row.tolist())) == experts for row in call.logits), "no ties"
        assert call.active_experts == len(call.logits.topk(4).indices.unique())
        assert torch.equal(call.logits, inputs.call_inputs(shape, 50, torch.device("cpu"), seed=1).logits)
        assert not torch.equal(call.logits, inputs.call_inputs(shape, 50, torch.device("cpu"), seed=2).logits)


def test_rivals_by_name() -> None:
    assert rivals.choose("all") == rivals.RIVALS
    assert rivals.choose("none") == ()
    assert [rival.name for rival in rivals.choose("marlin, humming-w4a8,marlin")] == ["marlin", "humming-w4a8"]
    with pytest.raises(ValueError, match="expected all, none, or some of humming-w4a8, humming-w4a16, triton_kernels"):
        rivals.choose("cutlass")


def test_every_rival_says_why_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for rival in rivals.RIVALS:
        with pytest.raises(Absent) as caught:
            rival.find([tmp_path], (12, 0))
        assert "not installed" in str(caught.value)
        assert str(tmp_path) in str(caught.value), "where it was looked for"
        assert "\n" not in str(caught.value)


def test_rivals_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for name in ("humming", "triton_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "humming" / "_version.py").write_text("__version__ = version = '0.1.19'\n")
    with pytest.raises(Absent, match="needs vLLM's routing operators, and vLLM is not installed, and no _moe_C"):
        humming.find([tmp_path], (9, 0))
    (tmp_path / "_moe_C_stable.abi3.so").touch()
    assert humming.find([tmp_path], (9, 0)) == Found(path=tmp_path / "humming", version="0.1.19")
    assert marlin.find([tmp_path], (9, 0)).path == tmp_path / "_moe_C_stable.abi3.so"
    with pytest.raises(Absent, match="compute capability 8.0 or newer, this GPU has 7.5"):
        marlin.find([tmp_path], (7, 5))
    with pytest.raises(Absent, match="has no matmul_ogs"):
        rivals.choose("triton_kernels")[0].find([tmp_path], (9, 0))
    (tmp_path / "triton_kernels" / "matmul_ogs.py").touch()
    assert rivals.choose("triton_kernels")[0].find([tmp_path], (9, 0)).path == tmp_path / "triton_kernels"
    for name in ("flashinfer", "flashinfer-sm12x", "b12x"):
        with pytest.raises(Absent, match="this GPU has 9.0"):
            rivals.choose(name)[0].find([tmp_path], (9, 0))
    for name in ("flashinfer", "b12x"):  # the second as FlashInfer brings it
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    assert rivals.choose("flashinfer")[0].find([tmp_path], (12, 1)).path == tmp_path / "flashinfer"
    with pytest.raises(Absent, match="has no CuTe layer of MXFP8 x MXFP4 for SM12x"):
        rivals.choose("flashinfer-sm12x")[0].find([tmp_path], (12, 1))
    with pytest.raises(Absent, match="is FlashInfer's, which has no moe/fused_moe/api.py"):
        rivals.choose("b12x")[0].find([tmp_path], (12, 0))


def test_marlin_weights_are_where_its_fragments_want_them() -> None:
    n, k = 128, 48
    blocks = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).view(n, k)
    words = marlin.marlin_weights(blocks)
    assert words.shape == (k // 16, 2 * n)
    for tile_k, tile_n, lane, warp in ((0, 0, 0, 0), (2, 1, 31, 3), (1, 0, 13, 2)):
        word = int(words[tile_k, 128 * tile_n + 4 * lane + warp]) & 0xFFFFFFFF
        row, column = 16 * tile_k + 2 * (lane % 4), 64 * tile_n + 16 * warp + lane // 4
        fragment = [int(nibbles[column + c, row + r]) for c in (0, 8) for r in (0, 1, 8, 9)]
        assert [word >> 4 * i & 15 for i in range(8)] == [fragment[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_marlin_scales_and_bias_are_permutations() -> None:
    columns = torch.arange(128, dtype=torch.uint8)
    scales = marlin.marlin_scales(columns[:, None].expand(128, 3).contiguous())
    assert scales[0, :8].tolist() == [0, 16, 8, 24, 32, 48, 40, 56]
    assert all(sorted(row.tolist()) == list(range(128)) for row in scales)
    bias = marlin.marlin_bias(torch.arange(64.0)[None])
    assert bias[0, :10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    assert sorted(bias[0].tolist()) == list(range(64))


def test_marlin_and_humming_blocks() -> None:
    assert [marlin.block_size(tokens, 4, 128) for tokens in (1, 128, 512, 4096)] == [8, 8, 32, 64]
    tuning = [(0, 64, {"block_shape": [16, 1, 1]}), (64, 256, {"block_shape": [32, 1, 1]})]
    assert [humming.block_rows(tuning, slots) for slots in (1, 64, 65, 999)] == [16, 16, 32, 64]


@pytest.mark.parametrize("name", ["flashinfer", "flashinfer-sm12x", "b12x"])
@pytest.mark.parametrize("sizes", [(160, 96), (128, 256)])
def test_rivals_that_need_another_gpu_are_called_as_their_source_says(
    name: str, sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against stand-ins that read the layouts which the packages' sources name; the packages themselves did not run."""
    rival_stubs.write(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in [m for m in sys.modules if m.partition(".")[0] in ("flashinfer", "b12x")]:
        monkeypatch.delitem(sys.modules, module)
    (rival,) = rivals.choose(name)
    shape = shapes.MoEShape(name="", experts=4, top_k=2, hidden=sizes[0], intermediate=sizes[1])
    tensors = inputs.layer_tensors(shape, torch.device("cpu"))
    call = inputs.call_inputs(shape, 5, torch.device("cpu"), seed=1)
    made = rival.prepare(rival.find([tmp_path], (12, 0)), tensors)(call)
    weights = tensors.prepared() if rival.layer is None else rival.layer(tensors)
    expected = fused_moe_from_logits(call.hidden_states, call.logits, 2, weights)
    for _ in range(2):
        found = made()
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 0.06
    assert relative_error(found.flip(0), expected) > 0.5
    for module in [m for m in sys.modules if m.partition(".")[0] in ("flashinfer", "b12x")]:
        monkeypatch.delitem(sys.modules, module)


def test_padding_changes_nothing() -> None:
    shape = shapes.MoEShape(name="", experts=3, top_k=2, hidden=96, intermediate=160)
    tensors = inputs.layer_tensors(shape, torch.device("cpu"))
    layer = padded.up_gate(tensors, 128)
    assert (layer.hidden, layer.intermediate) == (128, 256)
    parts = (layer.w13, layer.w13_scale, layer.w2, layer.w2_scale)
    biases = {"w13_bias": layer.w13_bias, "w2_bias": layer.w2_bias}
    weights = MoEWeights.from_mxfp4(*parts, **biases, gate_up_order="up_gate")
    call = inputs.call_inputs(shape, 7, torch.device("cpu"), seed=0)
    expected = fused_moe_from_logits(call.hidden_states, call.logits, 2, tensors.prepared())
    found = fused_moe_from_logits(layer.pad_rows(call.hidden_states), call.logits, 2, weights)
    assert torch.equal(found[:, :96], expected)
    assert not found[:, 96:].any()
