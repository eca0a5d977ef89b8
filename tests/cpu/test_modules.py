"""Tiles as modules, loading, and what a wheel that does not load says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from layers import bits, make_call

import mxfp4_moe
from mxfp4_moe._call.selection import manifest_tile
from mxfp4_moe._install import errors, loading
from mxfp4_moe.tiles import Tile


@pytest.fixture
def fresh_loader(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No extension counts as loaded, before and after."""
    for cached in (loading.load_tile, loading.moe_ops):
        monkeypatch.setattr(loading, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(loading, "library_fault", lambda module: None)  # the source tree has no libraries
    return monkeypatch


def test_import_loads_no_extension() -> None:
    code = (
        "import sys, mxfp4_moe\n"
        "assert not [m for m in sys.modules if m.startswith('mxfp4_moe._ext')], sys.modules\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'mxfp4_moe' not in maps, maps\n"
        "print(sorted(mxfp4_moe.__all__))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    for name in eval(result.stdout):
        assert hasattr(mxfp4_moe, name)


def test_module_is_cached_and_bound_to_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    module = mxfp4_moe.get_cutlass_fused_moe_module(backend="120", tile_mn=(8, 128))
    for same in ({"tile_mn": (8, 128)}, {"backend": "121", "use_fast_build": True, "tile_mn": (8, 128)}):
        assert module is mxfp4_moe.get_cutlass_fused_moe_module(**same)
    assert module is mxfp4_moe.get_cutlass_fused_moe_module("121", (8, 128))
    assert module is not mxfp4_moe.get_cutlass_fused_moe_module()
    assert module.tile == Tile(m=8, n=128, swap_ab=True)
    assert mxfp4_moe.get_cutlass_fused_moe_module().tile == Tile(m=128, n=128, swap_ab=False)
    call = make_call()
    output = torch.empty_like(call["hidden_states"])
    assert module.fused_moe(**call, output=output) is output
    assert torch.equal(bits(output), bits(mxfp4_moe.fused_moe(**call)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "100"}, ValueError, r"backend: expected '120' .*SM90.*got '100'"),
        ({"backend": "89"}, ValueError, r"backend: expected '120' or '121' .*got '89'"),
        ({"backend": 120}, ValueError, r"backend: expected '120' .*got 120"),
        ({"tile_mn": (96, 128)}, ValueError, r"tile_mn: expected M a multiple of 64, or 8, 16 or 32 .*got \(96, 128\)"),
        ({"tile_mn": (24, 128)}, ValueError, r"tile_mn: expected M a multiple of 64, or 8, 16 or 32 .*got \(24, 128\)"),
        ({"tile_mn": (16, 32)}, ValueError, r"tile_mn: expected N of at least 64 for a swapped tile \(M = 16\), got"),
        ({"tile_mn": (128, 4)}, ValueError, r"tile_mn: expected N from 8 to 256, got \(128, 4\)"),
        ({"tile_mn": (128, 512)}, ValueError, r"tile_mn: expected N from 8 to 256, got \(128, 512\)"),
        ({"tile_mn": (448, 8)}, ValueError, r"tile_mn: expected a tile of the manifest \(.*\), got \(448, 8\)"),
        ({"tile_mn": (0, 128)}, ValueError, r"tile_mn: expected M above 0, got \(0, 128\)"),
        ({"tile_mn": (-64, 128)}, ValueError, r"tile_mn: expected M above 0, got \(-64, 128\)"),
        ({"tile_mn": (128,)}, TypeError, r"tile_mn: expected a pair of integers \(M, N\), got \(128,\)"),
        ({"tile_mn": (128.0, 128)}, TypeError, r"tile_mn: expected a pair of integers \(M, N\), got \(128.0, 128\)"),
    ],
)
def test_module_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mxfp4_moe.get_cutlass_fused_moe_module(**arguments)


def test_tile_choice_names_are_exported() -> None:
    assert [mxfp4_moe.select_tile_mn_for_sm120(n) for n in (1, 63, 64, 255, 256)] == [
        (64, 128),
        (64, 128),
        (128, 128),
        (128, 128),
        (256, 64),
    ]
    assert manifest_tile((16, 128)).swap_ab
    assert tuple(tile.mn for tile in loading.manifest().tiles) == mxfp4_moe.SM120_SUPPORTED_TILE_MN


def test_loading_without_cuda_torch_is_one_sentence(fresh_loader: pytest.MonkeyPatch) -> None:
    fresh_loader.setattr(torch.version, "cuda", None)
    module = mxfp4_moe.get_cutlass_fused_moe_module()
    for load in (lambda: module.grouped_gemm, mxfp4_moe.prewarm_moe_tiles):
        with pytest.raises(
            RuntimeError, match=r"mxfp4_moe\._ext\.moe needs a CUDA build of torch: .*no CUDA"
        ) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_extension_that_does_not_load_quotes_what_it_was_built_for(
    fresh_loader: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    report = tmp_path / "build_report.json"
    report.write_text('{"built_with": {"cuda": "13.0", "torch": "2.13.0"}}')

    def refuse(name: str) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    fresh_loader.setattr(errors, "_REPORT", report)
    fresh_loader.setattr(torch.version, "cuda", "12.6")
    fresh_loader.setattr(importlib, "import_module", refuse)
    with pytest.raises(RuntimeError, match=r"mxfp4_moe\._ext\.moe cannot be loaded \(libcudart") as caught:
        mxfp4_moe.prewarm_moe_tiles()
    message = str(caught.value)
    assert "built for CUDA 13.0 with torch 2.13.0" in message
    assert f"you have torch {torch.__version__} with CUDA 12.6" in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, ImportError)
    report.unlink()
    with pytest.raises(RuntimeError, match="an unknown CUDA"):
        mxfp4_moe.prewarm_moe_tiles()
